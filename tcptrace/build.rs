//! Builds the kernel side for the BPF target and leaves the object in `OUT_DIR`.

use std::{
    env,
    ffi::OsString,
    path::{Path, absolute},
    process::Command,
};

use anyhow::{Context as _, Result, anyhow, ensure};

#[path = "../xtask/src/linker.rs"]
mod linker;

fn main() {
    if let Err(error) = build() {
        // Shown as an error of this package, without what cargo wraps around a failed program.
        println!("cargo::error={error:#}");
    }
}

fn build() -> Result<()> {
    let root = Path::new("..");
    // The sources of the probes are added by aya-build.
    for input in ["Cargo.toml", "Cargo.lock"] {
        println!("cargo::rerun-if-changed={}", root.join(input).display());
    }
    let linker = linker::path(root);
    println!("cargo::rerun-if-changed={}", linker.display());

    let rustc = env::var_os("RUSTC").context("RUSTC is not set: cargo runs this")?;
    linker::check_compiler(&rustc)?;
    let sysroot = sysroot(&rustc)?;
    linker::check(root)
        .and_then(|()| check_core(&sysroot))
        .map_err(|missing| anyhow!("{missing:#}: run `cargo xtask setup`"))?;

    // The object is the same in every profile, and for `cargo check`, `doc` and `test`, which each run
    // this with their own OUT_DIR: they share one build of it.
    let out = env::var_os("OUT_DIR").context("OUT_DIR is not set: cargo runs this")?;
    let target = Path::new(&out).ancestors().nth(4);
    let shared = target.context("OUT_DIR is not in a target directory")?;

    // SAFETY: nothing else runs in this program yet.
    unsafe {
        for endian in ["BPFEL", "BPFEB"] {
            env::set_var(
                format!("CARGO_TARGET_{endian}_UNKNOWN_NONE_LINKER"),
                absolute(&linker)?,
            );
        }
        env::set_var("CARGO_BUILD_BUILD_DIR", shared.join("bpf"));
        // Lets the pinned stable compiler build `core` for BPF. It is for this inner build only.
        env::set_var("RUSTC_BOOTSTRAP", "1");
        // aya-build turns each line of the inner cargo into a warning.
        env::set_var("CARGO_TERM_QUIET", "true");
        env::remove_var("CARGO_TERM_VERBOSE");
    }
    aya_build::build_ebpf(
        [aya_build::Package {
            name: "tcptrace-ebpf",
            root_dir: "../tcptrace-ebpf",
            ..Default::default()
        }],
        // Rustup takes a path as a name: this is the very toolchain that builds the user side.
        aya_build::Toolchain::Custom(&sysroot),
    )
    .context("the kernel side does not build")
}

/// Where the toolchain of `rustc` is.
fn sysroot(rustc: &OsString) -> Result<String> {
    let output = Command::new(rustc).args(["--print", "sysroot"]).output()?;
    let path = String::from_utf8(output.stdout)?;
    Ok(path.trim().to_owned())
}

/// No `core` comes ready for BPF, so its sources are needed.
fn check_core(sysroot: &str) -> Result<()> {
    let library = Path::new(sysroot).join("lib/rustlib/src/rust/library");
    ensure!(library.exists(), "rust-src is missing from the toolchain");
    Ok(())
}
