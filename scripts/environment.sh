#!/bin/sh
# usage: environment.sh FOLDER NAME REQUIREMENT...
#
# Makes FOLDER a virtual environment with the REQUIREMENTs (arguments of `pip install`), known as
# NAME. Does nothing if that was already done with this pyproject.toml; installs on top if
# pyproject.toml has changed; starts over if another interpreter is asked for, if the old one is
# gone, or if the last attempt was cut short. Each way to fail says one line.

folder=$1
name=$2
shift 2

stamp=$folder/.installed-$name
# beside the folder, not in it: it must outlive a removal that is interrupted half way
unfinished=$folder.unfinished
log=$folder/pip.log
python=$folder/bin/python
# the version and the home of an interpreter, the same inside and outside a virtual environment
identity='import sys; print(sys.version, sys.base_prefix); sys.exit(sys.version_info < (3, 12))'
state=$(cksum <pyproject.toml; printf '%s\n' "$*")

fail() {
    printf 'make %s: %s\n' "${GOAL:-demo}" "$1" >&2
    exit 1
}

reusable() {
    [ ! -e "$unfinished" ] || return 1
    ours=$("$python" -c "$identity" 2>/dev/null) || return 1
    [ -z "$PYTHON" ] || [ "$ours" = "$("$base" -c "$identity" 2>/dev/null)" ]
}

create() {
    [ -n "$base" ] || base=$(scripts/find_python.sh) || exit 1
    "$base" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "$base lacks the venv module: install it (Debian, Ubuntu: apt install python3-venv)\
 or name another: make ${GOAL:-demo} PYTHON=python3.13"
    printf 'Making %s with %s (%s)\n' "$folder" "$base" "$("$base" -V 2>&1)"
    { touch "$unfinished" && rm -rf "$folder"; } 2>/dev/null ||
        fail "cannot write $folder in $PWD: make the folder writable, or clone to another place"
    "$base" -m venv "$folder" >/dev/null 2>&1 ||
        fail "\`$base -m venv $folder\` did not succeed; run it to see why"
}

install() { # shows what pip does, but leaves its complaints to the log
    "$python" -m pip install "$@" 2>>"$log" && return
    # pip refuses before it touches anything, so what worked before still does
    $new || rm -f "$unfinished"
    fail "pip could not install what $folder needs (no network?); the reason is in $log"
}

trap 'exit 130' INT TERM
base=""
[ -z "$PYTHON" ] || base=$(scripts/find_python.sh) || exit 1
if reusable; then
    [ "$state" != "$(cat "$stamp" 2>/dev/null)" ] || exit 0
    new=false
else
    new=true
    create
fi
touch "$unfinished"
rm -f "$log"
install 'pip>=25.1' # the first that knows --group
install "$@"
printf '%s\n' "$state" >"$stamp"
rm -f "$unfinished"
