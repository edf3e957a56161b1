//! Building and starting the demo and the benchmarks.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::run::{cargo, find, is_root, line, root, run, target_dir, with_sudo};
use crate::second_qemu::{Second, VARIABLE, second_qemu};
use crate::setup::{self, Purpose};

/// The environment variable by which tests and benchmarks find the built `godwit`.
pub(crate) const BINARY: &str = "GODWIT_BIN";

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

/// Sets up, builds Godwit and the benchmark that was named, and becomes it. Each benchmark is a program of the crate
/// `bench`, so that one which is being written does not stop the others.
///
/// # Errors
/// When there is no such benchmark; when something is missing, does not build or does not start.
pub(crate) fn bench(name: &str, install: bool, words: &[String], yes: bool) -> Result<()> {
    let known = benchmarks(&root().join("proof/bench/src/bin"))?;
    if !known.iter().any(|one| one == name) {
        bail!("there is no benchmark {name}; there is: {}", known.join(", "));
    }
    // `--install` may also stand behind the name, among the words that are handed on.
    let (asked, words): (Vec<&String>, Vec<&String>) = words.iter().partition(|word| *word == "--install");
    let peers = install || !asked.is_empty();
    setup::ensure(if peers { Purpose::Peers } else { Purpose::Bench }, yes)?;
    let release = build(&["godwit", "e2e", "bench"])?;
    let mut program = Command::new(release.join(name));
    program.args(words).env(BINARY, release.join("godwit"));
    match second_qemu()? {
        Second::Here(dir, _) => drop(program.env(VARIABLE, dir)),
        Second::CannotBeHad(why) => println!("bench: no other QEMU: {why}"),
    }
    become_root_and_exec(program)
}

/// The benchmarks' names: one source file each.
fn benchmarks(folder: &Path) -> Result<Vec<String>> {
    let entries = fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
    let files = entries.filter_map(|entry| Some(entry.ok()?.path()));
    let mut names: Vec<String> = files
        .filter(|file| file.extension().is_some_and(|ending| ending == "rs"))
        .filter_map(|file| Some(file.file_stem()?.to_str()?.to_owned()))
        .collect();
    names.sort();
    Ok(names)
}

fn build(packages: &[&str]) -> Result<PathBuf> {
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
    let mut sudo = with_sudo(&program);
    println!("  {}", line(&sudo));
    Err(sudo.exec()).context("cannot start sudo")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_benchmark_that_is_not_there_is_refused_with_those_that_are() {
        let error = bench("no-such-benchmark", false, &[], false).unwrap_err().to_string();
        let known = benchmarks(&root().join("proof/bench/src/bin")).unwrap();
        assert!(error.ends_with(&known.join(", ")) && !known.is_empty(), "{error}");
    }
}
