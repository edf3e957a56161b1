//! Another QEMU beside the system's, unpacked from Debian's packages, for tests across versions.
//!
//! Nothing is installed. The packages the other version needs and the system lacks are unpacked below the target
//! directory; a wrapper points the emulator at its own libraries and firmware. Tests find it by `GODWIT_QEMU_ALT`.

use std::fs;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::apt::{self, Plan, Sources};
use crate::run::{capture, find, target_dir};
use crate::setup::{major_minor, qemu_version};

/// The environment variable by which tests find the folder that holds the other `qemu-system-x86_64`.
pub(crate) const VARIABLE: &str = "GODWIT_QEMU_ALT";

const PACKAGE: &str = "qemu-system-x86";
/// The versions that tests across versions are known to hold for. A newer one that appears in some archive is not taken
/// by chance: `cargo xtask test` must not fail for what nobody changed here.
const TESTED: [(u32, u32); 2] = [(7, 2), (10, 0)];
/// Written last into a folder that is whole; holds the package's version.
const COMPLETE: &str = "complete";
const PROGRAM: &str = "qemu-system-x86_64";

/// Whether there is another QEMU to test with.
pub(crate) enum Second {
    /// Its folder and its version.
    Here(PathBuf, String),
    /// Why this system has none; tests that need it are left out.
    CannotBeHad(String),
}

/// Finds the other QEMU, downloading and unpacking it the first time.
///
/// # Errors
/// When one can be had but does not arrive or does not run.
pub(crate) fn second_qemu() -> Result<Second> {
    if !apt::is_here() {
        return Ok(Second::CannotBeHad("this system has no apt".to_owned()));
    }
    let system = find(PROGRAM).context("the system's own QEMU is missing; run `cargo xtask setup test`")?;
    let system = qemu_version(&system)?;
    let cache = target_dir()?.join("qemu-alt");
    if let Some(dir) = unpacked_before(&cache, &system) {
        let said = qemu_version(&dir.join(PROGRAM))?;
        return Ok(Second::Here(dir, said));
    }
    let Some((sources, version)) = other_version(&system)? else {
        return Ok(Second::CannotBeHad(format!(
            "the system has {system} and its archive none of the others that are tested, 7.2 and 10.0"
        )));
    };
    let short = version.rsplit_once(':').map_or(version.as_str(), |(_, rest)| rest);
    let dir = cache.join(short);
    unpack(&sources, &version, &dir).with_context(|| format!("cannot unpack QEMU {short}"))?;
    let said = qemu_version(&dir.join(PROGRAM))?;
    Ok(Second::Here(dir, said))
}

/// `cargo xtask qemu`: prints the system's QEMU and the other one.
///
/// # Errors
/// When a QEMU that should be there does not run.
pub(crate) fn report() -> Result<()> {
    let system = find(PROGRAM).context("the system has no QEMU; run `cargo xtask setup test`")?;
    println!("system  {:<10} {}", qemu_version(&system)?, system.display());
    match second_qemu()? {
        Second::Here(dir, version) => println!("other   {version:<10} {}", dir.join(PROGRAM).display()),
        Second::CannotBeHad(why) => println!("other   none: {why}; tests across versions are left out"),
    }
    Ok(())
}

/// A complete one from an earlier call, if it is still another version than the system's.
fn unpacked_before(cache: &Path, system: &str) -> Option<PathBuf> {
    let mut folders = fs::read_dir(cache).ok()?.filter_map(|entry| Some(entry.ok()?.path()));
    folders.find(|dir| is_other(&fs::read_to_string(dir.join(COMPLETE)).unwrap_or_default(), system))
}

/// Whether a version is one of those to test with, and of another minor release than the system's.
fn is_other(version: &str, system: &str) -> bool {
    let pair = major_minor(version);
    pair != major_minor(system) && pair.is_some_and(|pair| TESTED.contains(&pair))
}

/// The other version as apt has it: among the system's sources first, then in backports.
fn other_version(system: &str) -> Result<Option<(Sources, String)>> {
    let other = |sources: &Sources| -> Result<Option<String>> {
        Ok(sources
            .versions(PACKAGE)?
            .into_iter()
            .find(|version| is_other(version, system)))
    };
    let plain = Sources::system();
    if let Some(version) = other(&plain)? {
        return Ok(Some((plain, version)));
    }
    if apt::distribution()? != "debian" {
        return Ok(None);
    }
    let Ok(backports) = Sources::with_backports() else {
        return Ok(None);
    };
    Ok(other(&backports)?.map(|version| (backports, version)))
}

fn unpack(sources: &Sources, version: &str, dir: &Path) -> Result<()> {
    let name = dir.file_name().context("the folder has a name")?.to_string_lossy();
    let work = dir.with_file_name(format!("{name}.part"));
    if work.exists() {
        fs::remove_dir_all(&work)?;
    }
    let (debs, tree) = (work.join("debs"), work.join("root"));
    fs::create_dir_all(&debs)?;
    fs::create_dir_all(&tree)?;

    let plan = needed(sources, version, &work.join("status"))?;
    let wanted: Vec<_> = plan
        .install
        .into_iter()
        .filter(|(name, _)| !is_c_library(name))
        .collect();
    sources.download(&wanted, &debs)?;
    let mut count = 0;
    for entry in fs::read_dir(&debs)? {
        capture(Command::new("dpkg-deb").arg("-x").arg(entry?.path()).arg(&tree))?;
        count += 1;
    }
    if count != wanted.len() {
        bail!("{} packages were asked for and {count} arrived", wanted.len());
    }
    fs::remove_dir_all(&debs)?;
    let wrapper = work.join(PROGRAM);
    fs::write(&wrapper, WRAPPER)?;
    fs::set_permissions(&wrapper, fs::Permissions::from_mode(0o755))?;
    check(&wrapper, version)?;
    fs::write(work.join(COMPLETE), version)?;
    if dir.exists() {
        fs::remove_dir_all(dir)?;
    }
    fs::rename(&work, dir).with_context(|| format!("cannot rename {}", work.display()))
}

/// What apt would install on this system if it had no QEMU: QEMU and the libraries that are missing here. Where
/// installed libraries are newer than the other version allows (backports), all libraries come along instead.
fn needed(sources: &Sources, version: &str, status: &Path) -> Result<Plan> {
    let package = [format!("{PACKAGE}={version}")];
    let installed = fs::read_to_string(apt::config("Dir::State::status/f")?)?;
    fs::write(status, without_qemu(&installed))?;
    match sources.simulate_on(&package, Some(status)) {
        Ok(plan) if plan.remove.is_empty() => Ok(plan),
        _ => {
            fs::write(status, "")?;
            sources.simulate_on(&package, Some(status))
        }
    }
}

/// Everything is found relative to the wrapper, so the folder can be moved. `exec` keeps the process id.
const WRAPPER: &str = r#"#!/bin/sh
here=$(dirname "$(readlink -f "$0")")
root=$here/root
lib=$root/usr/lib/x86_64-linux-gnu
export LD_LIBRARY_PATH="$lib:$root/lib/x86_64-linux-gnu:$lib/pulseaudio${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
export QEMU_MODULE_DIR="$lib/qemu"
exec "$root/usr/bin/qemu-system-x86_64" -L "$root/usr/share/qemu" -L "$root/usr/share/seabios" -L "$root/usr/lib/ipxe/qemu" "$@"
"#;

/// The C library must be the one that started the process.
fn is_c_library(name: &str) -> bool {
    matches!(
        name.split(':').next(),
        Some("libc6" | "libc-bin" | "libc-l10n" | "locales")
    )
}

/// dpkg's record of installed packages, less QEMU and its firmware.
fn without_qemu(status: &str) -> String {
    let is_qemu = |paragraph: &&str| {
        let name = paragraph
            .lines()
            .find_map(|line| line.strip_prefix("Package: "))
            .unwrap_or_default();
        name.starts_with("qemu-") || matches!(name, "seabios" | "ipxe-qemu")
    };
    let kept: Vec<&str> = status.split("\n\n").filter(|paragraph| !is_qemu(paragraph)).collect();
    kept.join("\n\n")
}

/// It says the version that was asked for, and its own firmware runs.
fn check(program: &Path, version: &str) -> Result<()> {
    let said = qemu_version(program)?;
    if major_minor(&said) != major_minor(version) {
        bail!("it says that it is {said}, and {version} was unpacked");
    }
    let mut child = Command::new(program)
        .args([
            "-machine",
            "q35,accel=tcg",
            "-m",
            "64",
            "-nodefaults",
            "-display",
            "none",
            "-no-user-config",
        ])
        .args([
            "-chardev",
            "stdio,id=log",
            "-device",
            "isa-debugcon,iobase=0x402,chardev=log",
        ])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start {}", program.display()))?;
    let stdout = child.stdout.take().context("the emulator has no standard output")?;
    let booted = says(stdout, "SeaBIOS (version", Duration::from_secs(30));
    child.kill()?;
    let output = child.wait_with_output()?;
    if !booted {
        bail!(
            "its firmware did not start: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(())
}

/// Whether `words` arrive within `deadline`. The reader ends with its source, so nothing is left running.
fn says(mut source: impl Read + Send + 'static, words: &'static str, deadline: Duration) -> bool {
    const SEEN_MAX: usize = 1 << 20;
    let (done, waiting) = mpsc::channel();
    std::thread::spawn(move || {
        let (mut seen, mut buffer) = (Vec::new(), [0u8; 4096]);
        while let Ok(count @ 1..) = source.read(&mut buffer) {
            seen.extend_from_slice(&buffer[..count]);
            if seen.windows(words.len()).any(|window| window == words.as_bytes()) {
                // A receiver that stopped waiting has its answer already.
                let _ = done.send(true);
                return;
            }
            if seen.len() > SEEN_MAX {
                return;
            }
        }
    });
    waiting.recv_timeout(deadline).unwrap_or(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_record_loses_qemu_and_nothing_else() {
        let status =
            "Package: adduser\nStatus: ok\n\nPackage: qemu-utils\nStatus: ok\n\nPackage: seabios\n\nPackage: zlib1g\n";
        assert_eq!(
            without_qemu(status),
            "Package: adduser\nStatus: ok\n\nPackage: zlib1g\n"
        );
    }

    #[test]
    fn only_a_complete_folder_of_another_version_is_taken_again() {
        let cache = std::env::temp_dir().join(format!("godwit-qemu-test-{}", std::process::id()));
        let dir = cache.join("7.2+dfsg-7");
        fs::create_dir_all(&dir).unwrap();
        assert_eq!(unpacked_before(&cache, "10.0.2"), None);
        fs::write(dir.join(COMPLETE), "1:7.2+dfsg-7").unwrap();
        assert_eq!(unpacked_before(&cache, "10.0.2"), Some(dir));
        assert_eq!(unpacked_before(&cache, "7.2.22"), None);
        fs::remove_dir_all(&cache).unwrap();
    }

    #[test]
    fn a_version_nobody_tested_with_is_not_taken_by_chance() {
        assert!(is_other("1:7.2+dfsg-7", "10.0.2") && is_other("1:10.0.2+ds-2~bpo12+1", "7.2.22"));
        assert!(!is_other("1:11.1.3+ds-1~bpo13+1", "10.0.2"));
        assert!(!is_other("1:10.0.8+ds", "10.0.2"));
    }

    #[test]
    fn the_c_library_is_never_replaced() {
        assert!(is_c_library("libc6") && is_c_library("libc6:amd64") && !is_c_library("libcapstone4"));
    }

    #[test]
    fn words_are_found_across_reads_and_silence_is_a_no() {
        assert!(says(
            &b"..SeaBIOS (version 1)"[..],
            "SeaBIOS (version",
            Duration::from_secs(5)
        ));
        assert!(!says(&b"nothing"[..], "SeaBIOS (version", Duration::from_secs(5)));
    }
}
