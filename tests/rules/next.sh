#!/bin/sh
# Load the rule pack into the promtool of a current Prometheus, which Debian does not have, and replay the recorded hour.
#
# The tests of the signals are exact to the minute and stay with Debian's: since Prometheus 3 a window is open at its left
# end, so on the whole minutes on which tests evaluate it holds one sample less, and some alerts resolve a minute sooner.
#
# `go install` refuses Prometheus because of the replace directives in its go.mod, so a module of our own requires it. Go
# fetches and builds it once, which takes minutes, into a cache outside the repository. PROMTOOL_NEXT is a program to use
# instead. Not part of `make test`, for that needs no Go.
set -eu

version=v0.305.0 # Prometheus 3.5, the long-term release
cache=${XDG_CACHE_HOME:-$HOME/.cache}/shoal-promtool/$version
promtool=${PROMTOOL_NEXT:-$cache/promtool}

if [ ! -x "$promtool" ]; then
    command -v go >/dev/null || {
        echo "next.sh: go is missing; install it, or name a promtool in PROMTOOL_NEXT" >&2
        exit 1
    }
    mkdir -p "$cache"
    printf 'module promtool\n\ngo 1.24\n' >"$cache/go.mod"
    (cd "$cache" && go get -v "github.com/prometheus/prometheus/cmd/promtool@$version" &&
        go build -o promtool github.com/prometheus/prometheus/cmd/promtool)
fi
cd "$(dirname "$0")/../../rules"
"$promtool" check rules --lint=all --lint-fatal ./*.yaml
"$promtool" test rules tests/fleet_test.yaml tests/healthy_hour_test.yaml
