#!/bin/sh
# Prints the path of the interpreter to build with: $PYTHON if it is set, otherwise the first one
# on PATH that is new enough. If there is none, one line says what was found and what to do.
#
# Plain sh and its builtins only: this runs before anything is known about the machine. Every
# candidate is run, not only looked up, because version managers leave shims on PATH for
# interpreters that are not installed.

probe='import sys
print("%d.%d.%d" % sys.version_info[:3])
sys.exit(sys.version_info < (3, 12))'
needed="Python 3.12 or newer is needed"
advice="name another: make ${GOAL:-demo} PYTHON=python3.13"
found=""

accept() { # prints the path $1 and ends the search if that interpreter is new enough
    new_enough=true
    version=$("$1" -c "$probe" 2>/dev/null) || new_enough=false
    case $version in
        [0-9]*) ;;
        *) return ;; # not an interpreter, or one that does not run
    esac
    if $new_enough; then
        printf '%s\n' "$1"
        exit
    fi
    found="$found${found:+, }$1 is $version"
}

fail() {
    printf 'make %s: %s\n' "${GOAL:-demo}" "$1" >&2
    exit 1
}

if [ -n "$PYTHON" ]; then
    path=$(command -v "$PYTHON") || fail "PYTHON=$PYTHON is not a command here; $advice"
    accept "$path"
    [ -n "$found" ] || fail "PYTHON=$PYTHON does not run as a Python interpreter; $advice"
else
    for name in python3 python3.14 python3.13 python3.12 python; do
        rest=$PATH: # every folder of PATH: a broken shim may hide a good interpreter behind it
        while [ -n "$rest" ]; do
            folder=${rest%%:*}
            rest=${rest#*:}
            case $folder in "$PWD"/.venv*) continue ;; esac # ours, active: about to be removed
            [ ! -x "${folder:-.}/$name" ] || accept "${folder:-.}/$name"
        done
    done
    [ -n "$found" ] || fail "$needed, but none was found; install it, or $advice"
fi
fail "$needed, but $found; $advice"
