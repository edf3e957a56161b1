//! Building and starting the demo and the benchmarks.

use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::run::{cargo, find, is_root, line, run, target_dir};
use crate::second_qemu::{Second, VARIABLE, second_qemu};
use crate::setup::{self, Purpose};

/// Sets up, builds Godwit and the demo, and becomes the demo.
///
/// # Errors
/// When something is missing, does not build or does not start.
pub(crate) fn demo(words: &[String], yes: bool) -> Result<()> {
    setup::ensure(Purpose::Demo, yes)?;
    let release = build(&["godwit", "e2e"])?;
    let mut program = Command::new(release.join("demo"));
    program.args(words).arg("--godwit").arg(release.join("godwit"));
    become_root_and_exec(program)
}

/// Sets up, builds Godwit and the benchmarks, and becomes the one that was named.
///
/// # Errors
/// When something is missing, does not build or does not start.
pub(crate) fn bench(name: &str, install: bool, words: &[String], yes: bool) -> Result<()> {
    // `--install` may also stand behind the name, among the words that are handed on.
    let (install_words, words): (Vec<&String>, Vec<&String>) = words.iter().partition(|word| *word == "--install");
    let purpose = if install || !install_words.is_empty() {
        Purpose::Peers
    } else {
        Purpose::Bench
    };
    setup::ensure(purpose, yes)?;
    let release = build(&["godwit", "e2e", "bench"])?;
    let mut program = Command::new(release.join("bench"));
    program
        .arg(name)
        .args(words)
        .arg("--godwit")
        .arg(release.join("godwit"));
    match second_qemu()? {
        Second::Here(dir, _) => drop(program.env(VARIABLE, dir)),
        Second::CannotBeHad(why) => println!("bench: no other QEMU: {why}"),
    }
    become_root_and_exec(program)
}

fn build(packages: &[&str]) -> Result<std::path::PathBuf> {
    for package in packages {
        println!("build: {package}");
        run(cargo().args(["build", "--locked", "--release", "-p", package]))?;
    }
    Ok(target_dir()?.join("release"))
}

/// Replaces this process, so that signals and the exit code are the program's own.
fn become_root_and_exec(mut program: Command) -> Result<()> {
    let path = Path::new(program.get_program()).to_path_buf();
    if !path.exists() {
        bail!(
            "{} was not built: does its crate have a program of that name?",
            path.display()
        );
    }
    if is_root() {
        let error = program.exec();
        return Err(error).with_context(|| format!("cannot start {}", path.display()));
    }
    if find("sudo").is_none() {
        bail!(
            "network namespaces need root and there is no sudo; run as root: {}",
            line(&program)
        );
    }
    println!("The hosts are network and mount namespaces on this machine, which need root; only this program gets it:");
    let mut sudo = Command::new("sudo");
    for (key, value) in program.get_envs() {
        sudo.arg(format!("{}={}", key.display(), value.unwrap_or_default().display()));
    }
    sudo.arg(program.get_program()).args(program.get_args());
    println!("  {}", line(&sudo));
    Err(sudo.exec()).context("cannot start sudo")
}
