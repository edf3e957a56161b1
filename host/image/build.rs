//! Compiles the micro guest's program statically, so that the library carries it and an installed godwit needs no compiler.

use std::env;
use std::path::PathBuf;
use std::process::{Command, exit};

fn main() {
    println!("cargo:rerun-if-changed=micro");
    let variable = |name: &str| env::var_os(name).expect("cargo sets OUT_DIR, RUSTC and TARGET");
    let program = PathBuf::from(variable("OUT_DIR")).join("godwit-micro");
    // Static glibc is part of libc6-dev, which every C compiler of Debian and Ubuntu brings.
    let status = Command::new(variable("RUSTC"))
        .args([
            "--edition=2024",
            "--crate-name=godwit_micro",
            "--crate-type=bin",
            "--target",
        ])
        .arg(variable("TARGET"))
        .args([
            "-Ctarget-feature=+crt-static",
            "-Copt-level=2",
            "-Cpanic=abort",
            "-Cstrip=symbols",
            "-o",
        ])
        .arg(&program)
        .arg("micro/main.rs")
        .status();
    match status {
        Ok(status) if status.success() => {}
        other => {
            eprintln!(
                "the micro guest's program did not compile: {other:?}; is a C compiler with static libc (libc6-dev) there?"
            );
            exit(1);
        }
    }
}
