#!/bin/sh
# `cargo xtask fuzz` has cargo run this in place of rustc, for the workspace's own packages. It counts executions of
# each edge in the two that are fuzzed, as libFuzzer expects it. What they depend on stays as it is, so that its builds
# are shared with `cargo test`. The flags are those of cargo-fuzz; they need no nightly compiler. An optimised build has no
# overflow checks unless they are asked for.
case " $* " in
*" --crate-name tcptrace "* | *" --crate-name fuzz "*)
    exec "$@" -C opt-level=1 -C debug-assertions=on -C overflow-checks=on --cfg fuzzing \
        -C passes=sancov-module \
        -C llvm-args=-sanitizer-coverage-level=4 \
        -C llvm-args=-sanitizer-coverage-inline-8bit-counters \
        -C llvm-args=-sanitizer-coverage-pc-table \
        -C llvm-args=-sanitizer-coverage-trace-compares
    ;;
esac
exec "$@"
