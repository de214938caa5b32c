"""A small GPT-2 with random parameters, as files of Hugging Face, and its equations in NumPy."""

import json
import math

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
CONFIG = {
    "model_type": "gpt2",
    "n_head": 3,
    "layer_norm_epsilon": 1e-3,
    "activation_function": "gelu_new",
}


def tensors(vocabulary=37, positions=20, features=24, hidden=40, layers=2, seed=0, scale=0.4):
    """Every tensor of a model by its name, float32: gains and biases are random too."""
    rng = np.random.default_rng(seed)

    def normal(*shape, mean=0.0):
        return (mean + scale * rng.normal(size=shape)).astype(np.float32)

    made = {
        "wte.weight": normal(vocabulary, features),
        "wpe.weight": normal(positions, features),
        "ln_f.weight": normal(features, mean=1.0),
        "ln_f.bias": normal(features),
    }
    for i in range(layers):
        for norm in ("ln_1", "ln_2"):
            made[f"h.{i}.{norm}.weight"] = normal(features, mean=1.0)
            made[f"h.{i}.{norm}.bias"] = normal(features)
        for name, k, m in (
            ("attn.c_attn", features, 3 * features),
            ("attn.c_proj", features, features),
            ("mlp.c_fc", features, hidden),
            ("mlp.c_proj", hidden, features),
        ):
            made[f"h.{i}.{name}.weight"] = normal(k, m)
            made[f"h.{i}.{name}.bias"] = normal(m)
    return made


def rounded(made, dtype):
    return {name: array.astype(DTYPES[dtype]) for name, array in made.items()}


def write(folder, made, config=CONFIG, prefix="", shards=1, **more):
    """The file or the index in `folder`, with tensors beyond the parameters in `more`."""
    folder.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    named = {f"{prefix}{name}": array for name, array in made.items()} | more
    if shards == 1:
        save_file(named, folder / "model.safetensors")
        return folder / "model.safetensors"
    places = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = dict(list(named.items())[i::shards])
        save_file(part, folder / file)
        places |= dict.fromkeys(part, file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return index


def logits(made, ids, heads, epsilon, activation="gelu_new"):
    """What GPT-2 says, position by position, in float64. After Radford et al. 2019."""
    made = {name: np.asarray(array, np.float64) for name, array in made.items()}
    layers = len({name.split(".")[1] for name in made if name.startswith("h.")})

    def linear(x, name):
        return x @ made[f"{name}.weight"] + made[f"{name}.bias"]

    def norm(x, name):
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon)
        return scaled * made[f"{name}.weight"] + made[f"{name}.bias"]

    def act(x):
        if activation == "gelu_new":
            return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
        return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))

    def attend(x, name):
        length, features = x.shape
        size = features // heads
        qkv = linear(x, f"{name}.c_attn")
        out = np.zeros_like(x)
        for h in range(heads):
            q, k, v = (
                qkv[:, part * features + h * size : part * features + (h + 1) * size]
                for part in range(3)
            )
            for i in range(length):
                scores = k[: i + 1] @ q[i] / math.sqrt(size)
                weights = np.exp(scores - scores.max())
                out[i, h * size : (h + 1) * size] = weights / weights.sum() @ v[: i + 1]
        return linear(out, f"{name}.c_proj")

    results = []
    for row in np.asarray(ids):
        x = made["wte.weight"][row] + made["wpe.weight"][: len(row)]
        for i in range(layers):
            x = x + attend(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn")
            x = x + linear(
                act(linear(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")), f"h.{i}.mlp.c_proj"
            )
        results.append(norm(x, "ln_f") @ made["wte.weight"].T)
    return np.stack(results)
