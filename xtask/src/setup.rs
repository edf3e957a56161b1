//! Finding the programs a command needs, and installing the packages that bring the missing ones.
//!
//! What is looked for is programs, not package names: a QEMU built by hand in /usr/local is as good as Debian's.

use std::fmt;
use std::io::{BufRead, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use clap::ValueEnum;

use crate::apt::{self, Plan, Sources};
use crate::run::{capture, cargo, find, is_root, line, run, succeeds, with_sudo};

/// What is about to run; it decides which programs are needed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub(crate) enum Purpose {
    /// `cargo xtask demo`
    Demo,
    /// `cargo xtask test`
    Test,
    /// `cargo xtask bench`
    Bench,
    /// `cargo xtask bench --install`: libvirt too, to measure against.
    Peers,
    /// `cargo xtask release`
    Release,
}

/// Packages are missing and may not be installed without a yes. Exit code 3.
#[derive(Debug)]
pub(crate) struct NeedsConsent {
    line: String,
}

impl fmt::Display for NeedsConsent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "packages are missing and need root to install; run this, then the same command again:\n  {}",
            self.line
        )
    }
}

impl std::error::Error for NeedsConsent {}

struct Program {
    name: &'static str,
    package: &'static str,
    why: &'static str,
    purposes: &'static [Purpose],
    good: fn(&Path) -> Result<(), String>,
}

const ALL: &[Purpose] = &[Purpose::Demo, Purpose::Test, Purpose::Bench, Purpose::Peers];

const PROGRAMS: &[Program] = &[
    Program {
        name: "qemu-system-x86_64",
        package: "qemu-system-x86",
        why: "runs the guests",
        purposes: ALL,
        good: new_enough,
    },
    Program {
        name: "qemu-img",
        package: "qemu-utils",
        why: "disks and overlays",
        purposes: ALL,
        good: any,
    },
    Program {
        name: "busybox",
        package: "busybox-static",
        why: "the micro guest",
        purposes: ALL,
        good: is_static,
    },
    Program {
        name: "ip",
        package: "iproute2",
        why: "bridges, taps, namespaces",
        purposes: ALL,
        good: any,
    },
    Program {
        name: "nft",
        package: "nftables",
        why: "what VMs' ports let through",
        purposes: ALL,
        good: any,
    },
    Program {
        name: "tc",
        package: "iproute2",
        why: "shaped links",
        purposes: ALL,
        good: any,
    },
    Program {
        name: "nft",
        package: "nftables",
        why: "packet filters",
        purposes: ALL,
        good: any,
    },
    Program {
        name: "unshare",
        package: "util-linux",
        why: "hosts in namespaces",
        purposes: ALL,
        good: any,
    },
    Program {
        name: "nsenter",
        package: "util-linux",
        why: "hosts in namespaces",
        purposes: ALL,
        good: any,
    },
    Program {
        name: "setpriv",
        package: "util-linux",
        why: "guests under their own user",
        purposes: ALL,
        good: any,
    },
    Program {
        name: "mount",
        package: "mount",
        why: "the shared pool",
        purposes: ALL,
        good: any,
    },
    Program {
        name: "prlimit",
        package: "util-linux",
        why: "bounds on helpers",
        purposes: ALL,
        good: any,
    },
    Program {
        name: "zstd",
        package: "zstd",
        why: "the guest's kernel modules",
        purposes: ALL,
        good: any,
    },
    Program {
        name: "apt-get",
        package: "apt",
        why: "downloads the guest's kernel",
        purposes: ALL,
        good: any,
    },
    Program {
        name: "dpkg-deb",
        package: "dpkg",
        why: "unpacks the guest's kernel",
        purposes: ALL,
        good: any,
    },
    Program {
        name: "mmdebstrap",
        package: "mmdebstrap",
        why: "the Debian guest",
        purposes: &[Purpose::Test],
        good: any,
    },
    Program {
        name: "mke2fs",
        package: "e2fsprogs",
        why: "the Debian guest's disk",
        purposes: &[Purpose::Test],
        good: any,
    },
    Program {
        name: "sfdisk",
        package: "fdisk",
        why: "reads what we write of partitions",
        purposes: &[Purpose::Test],
        good: any,
    },
    Program {
        name: "mformat",
        package: "mtools",
        why: "the Debian guest's EFI partition",
        purposes: &[Purpose::Test],
        good: any,
    },
    Program {
        name: "grub-mkimage",
        package: "grub-pc-bin",
        why: "starts the Debian guest by BIOS",
        purposes: &[Purpose::Test],
        good: has_bios_grub,
    },
    Program {
        name: "grub-mkimage",
        package: "grub-efi-amd64-bin",
        why: "starts the Debian guest by UEFI",
        purposes: &[Purpose::Test],
        good: has_efi_grub,
    },
    Program {
        name: "ssh",
        package: "openssh-client",
        why: "speaks with the Debian guest",
        purposes: &[Purpose::Test],
        good: any,
    },
    Program {
        name: "cc",
        package: "gcc",
        why: "builds TLS and SQLite",
        purposes: ALL,
        good: any,
    },
    Program {
        name: "dropbear",
        package: "dropbear-bin",
        why: "a machine that is added over SSH",
        purposes: &[Purpose::Test],
        good: any,
    },
    Program {
        name: "readelf",
        package: "binutils",
        why: "what the program needs of a system",
        purposes: &[Purpose::Release, Purpose::Test],
        good: any,
    },
    Program {
        name: "dpkg-deb",
        package: "dpkg",
        why: "packs the Debian package",
        purposes: &[Purpose::Release],
        good: any,
    },
    Program {
        name: "cc",
        package: "gcc",
        why: "builds TLS and SQLite",
        purposes: &[Purpose::Release],
        good: any,
    },
    Program {
        name: "virsh",
        package: "libvirt-clients",
        why: "the peer to measure against",
        purposes: &[Purpose::Peers],
        good: any,
    },
    Program {
        name: "libvirtd",
        package: "libvirt-daemon-system",
        why: "the peer to measure against",
        purposes: &[Purpose::Peers],
        good: any,
    },
];

/// The oldest QEMU that Godwit drives.
const QEMU_MIN: (u32, u32) = (7, 2);

/// Looks for what `purpose` needs, reports it, and installs what is missing.
///
/// As root it installs at once; otherwise it shows the line with sudo and asks, unless `yes`.
///
/// # Errors
/// [`NeedsConsent`] without a terminal to ask on; apt's own words when it cannot install.
pub(crate) fn ensure(purpose: Purpose, yes: bool) -> Result<()> {
    let found = look(purpose);
    let missing: Vec<&Found> = found.iter().filter(|one| one.state.is_err()).collect();
    if missing.is_empty() {
        println!("setup: all {} programs are here", found.len());
        return Ok(());
    }
    print!("{}", table(&found));
    let mut packages: Vec<String> = missing.iter().map(|one| one.program.package.to_owned()).collect();
    packages.sort();
    packages.dedup();
    install(purpose, &packages, yes)?;
    let still: Vec<String> = look(purpose)
        .iter()
        .filter_map(|one| Some(format!("{}: {}", one.program.name, one.state.as_ref().err()?)))
        .collect();
    if !still.is_empty() {
        bail!("the packages were installed, and still: {}", still.join("; "));
    }
    Ok(())
}

/// The table alone, for `cargo xtask setup --list`.
pub(crate) fn list(purpose: Purpose) {
    print!("{}", table(&look(purpose)));
}

/// Adds rustfmt and clippy to the tool chain when rustup can; a minimal tool chain has neither.
///
/// # Errors
/// When they are missing and there is no rustup to add them.
pub(crate) fn ensure_components() -> Result<()> {
    for component in ["fmt", "clippy"] {
        if succeeds(cargo().args([component, "--version"])) {
            continue;
        }
        let name = if component == "fmt" { "rustfmt" } else { component };
        let rustup = find("rustup").with_context(|| {
            format!("cargo {component} is missing and there is no rustup to add it; install {name} for this tool chain")
        })?;
        run(Command::new(rustup).args(["component", "add", name]))?;
    }
    Ok(())
}

/// The version of a QEMU, from its first line (`QEMU emulator version 7.2.22 (...)`).
///
/// # Errors
/// When the program cannot run or says something else.
pub(crate) fn qemu_version(program: &Path) -> Result<String> {
    let text = capture(Command::new(program).arg("--version"))?;
    let version = text
        .lines()
        .next()
        .and_then(|line| line.split("version ").nth(1))
        .and_then(|rest| rest.split(' ').next());
    version
        .map(str::to_owned)
        .with_context(|| format!("{} does not say its version", program.display()))
}

/// Major and minor of a version such as `7.2.22` or Debian's `1:7.2+dfsg-7`.
pub(crate) fn major_minor(version: &str) -> Option<(u32, u32)> {
    let version = version.rsplit_once(':').map_or(version, |(_, rest)| rest);
    let mut numbers = version.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

struct Found {
    program: &'static Program,
    state: Result<PathBuf, String>,
}

fn look(purpose: Purpose) -> Vec<Found> {
    let wanted = PROGRAMS.iter().filter(|program| program.purposes.contains(&purpose));
    wanted
        .map(|program| {
            let state = match find(program.name) {
                None => Err("missing".to_owned()),
                Some(path) => (program.good)(&path).map(|()| path),
            };
            Found { program, state }
        })
        .collect()
}

fn table(found: &[Found]) -> String {
    let mut text = format!("{:<20} {:<28} {:<22} {}\n", "program", "needed for", "package", "state");
    for one in found {
        let state = match &one.state {
            Ok(path) => path.display().to_string(),
            Err(why) => format!("- {why}"),
        };
        let program = one.program;
        text += &format!(
            "{:<20} {:<28} {:<22} {state}\n",
            program.name, program.why, program.package
        );
    }
    text
}

fn any(_: &Path) -> Result<(), String> {
    Ok(())
}

/// GRUB's parts come in packages of their own, by platform.
fn has_bios_grub(_: &Path) -> Result<(), String> {
    has_part("/usr/lib/grub/i386-pc/boot.img")
}

fn has_efi_grub(_: &Path) -> Result<(), String> {
    has_part("/usr/lib/grub/x86_64-efi/normal.mod")
}

fn has_part(path: &str) -> Result<(), String> {
    if Path::new(path).exists() {
        Ok(())
    } else {
        Err(format!("{path} is missing"))
    }
}

fn new_enough(path: &Path) -> Result<(), String> {
    let version = qemu_version(path).map_err(|error| error.to_string())?;
    match major_minor(&version) {
        Some(pair) if pair >= QEMU_MIN => Ok(()),
        _ => Err(format!(
            "{} is {version}; {}.{} or newer is needed",
            path.display(),
            QEMU_MIN.0,
            QEMU_MIN.1
        )),
    }
}

/// The micro guest has no libraries, so its busybox must need none: an ELF file without an interpreter.
fn is_static(path: &Path) -> Result<(), String> {
    let bytes = std::fs::read(path).map_err(|error| error.to_string())?;
    match needs_interpreter(&bytes) {
        Some(false) => Ok(()),
        Some(true) => Err(format!("{} is not static", path.display())),
        None => Err(format!("{} is not a 64-bit program", path.display())),
    }
}

/// Whether a 64-bit little-endian ELF file has a `PT_INTERP` header (System V ABI, chapter 5); `None` when it is none.
fn needs_interpreter(bytes: &[u8]) -> Option<bool> {
    const PT_INTERP: u32 = 3;
    let word = |at: usize, len: usize| -> Option<u64> {
        let slice = bytes.get(at..at.checked_add(len)?)?;
        Some(slice.iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte)))
    };
    if bytes.get(..6)? != b"\x7fELF\x02\x01" {
        return None;
    }
    let (table, size, count) = (
        word(0x20, 8)? as usize,
        word(0x36, 2)? as usize,
        word(0x38, 2)? as usize,
    );
    for index in 0..count {
        if word(table.checked_add(index * size)?, 4)? as u32 == PT_INTERP {
            return Some(true);
        }
    }
    Some(false)
}

fn install(purpose: Purpose, packages: &[String], yes: bool) -> Result<()> {
    if !apt::is_here() {
        let all = packages.join(" ");
        bail!("these packages are missing, and this system has no apt to install them: {all}");
    }
    if !is_root() {
        return install_through_sudo(purpose, packages, yes);
    }
    let planned = match plan(packages) {
        Err(error) if apt::lists_are_old(&format!("{error:#}")) => {
            run_shown(&mut apt::update()).and_then(|()| plan(packages))
        }
        other => other,
    };
    if let Err(error) = planned.map_err(explained)?.into_iter().try_for_each(run_call) {
        // Lists older than the mirror name files that are gone: new lists, once more.
        println!("setup: {error:#}; once more with new package lists");
        run_shown(&mut apt::update())?;
        return plan(packages).map_err(explained)?.into_iter().try_for_each(run_call);
    }
    Ok(())
}

fn run_call((sources, packages): (Sources, Vec<String>)) -> Result<()> {
    run_shown(&mut sources.install(&packages))
}

fn run_shown(command: &mut Command) -> Result<()> {
    println!("setup: {}", line(command));
    run(command)
}

/// One line with sudo, after a yes: apt itself where one plain call does it, else this program as root, which brings
/// the lists up to date or adds backports for one call.
fn install_through_sudo(purpose: Purpose, packages: &[String], yes: bool) -> Result<()> {
    let plain = Sources::system();
    let mut command = match plain.simulate(packages).and_then(|plan| harmless(&plan, packages)) {
        Ok(()) => with_sudo(&plain.install(packages)),
        Err(_) => {
            println!(
                "setup: {} need new package lists or backports; as root this program sees to it",
                packages.join(", ")
            );
            let mut own = Command::new(std::env::current_exe().context("cannot tell where this program is")?);
            let value = purpose.to_possible_value().context("every purpose has a name")?;
            own.args(["setup", value.get_name()]);
            with_sudo(&own)
        }
    };
    let shown = line(&command);
    println!("setup: {shown}");
    consent(&shown, yes)?;
    run(&mut command)
        .context("if apt's lists are older than its mirror: `sudo apt-get update`, then the same command again")
}

/// Which calls of apt bring these packages without taking anything away.
fn plan(packages: &[String]) -> Result<Vec<(Sources, Vec<String>)>> {
    let plain = Sources::system();
    let refusal = match plain.simulate(packages).and_then(|plan| harmless(&plan, packages)) {
        Ok(()) => return Ok(vec![(plain, packages.to_vec())]),
        Err(error) => error,
    };
    let (qemu, others): (Vec<String>, Vec<String>) =
        packages.iter().cloned().partition(|name| name.starts_with("qemu-"));
    if qemu.is_empty() || apt::lists_are_old(&refusal.to_string()) || apt::distribution()? != "debian" {
        return Err(refusal);
    }
    let backports = Sources::with_backports().with_context(|| format!("{refusal:#}; backports could not help"))?;
    let planned = backports.simulate(&qemu)?;
    harmless(&planned, &qemu)?;
    if backports.is_temporary() {
        println!(
            "setup: {} from backports, used for this one call: an installed QEMU package came from there",
            qemu.join(", ")
        );
    }
    let mut calls = vec![(backports, qemu)];
    if !others.is_empty() {
        harmless(&plain.simulate(&others)?, &others)?;
        calls.push((plain, others));
    }
    Ok(calls)
}

/// Refuses a plan that takes packages away; busybox alone may go, since its static sister replaces it.
fn harmless(plan: &Plan, packages: &[String]) -> Result<()> {
    let replaced = |name: &String| name == "busybox" && packages.iter().any(|one| one == "busybox-static");
    let lost: Vec<&str> = plan
        .remove
        .iter()
        .filter(|name| !replaced(name))
        .map(String::as_str)
        .collect();
    if lost.is_empty() {
        return Ok(());
    }
    bail!("installing {} would remove {}", packages.join(" "), lost.join(" "))
}

fn explained(error: anyhow::Error) -> anyhow::Error {
    if apt::universe_is_off() {
        return error.context("apt cannot install what is missing: `universe` is not among its sources; run `sudo add-apt-repository universe`");
    }
    error.context("apt cannot install what is missing; nothing was changed")
}

fn consent(shown: &str, yes: bool) -> Result<()> {
    let refused = || NeedsConsent { line: shown.to_owned() };
    if find("sudo").is_none() {
        return Err(refused().into());
    }
    if yes {
        return Ok(());
    }
    if !std::io::stdin().is_terminal() {
        return Err(refused().into());
    }
    print!("Run it? [Y/n] ");
    std::io::stdout().flush()?;
    let mut answer = String::new();
    std::io::stdin().lock().read_line(&mut answer)?;
    match answer.trim() {
        "" if answer.ends_with('\n') => Ok(()),
        "y" | "Y" | "yes" => Ok(()),
        _ => Err(refused().into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_compared_as_numbers() {
        assert_eq!(major_minor("7.2.22"), Some((7, 2)));
        assert_eq!(major_minor("1:10.0.2+ds-2+deb13u1~bpo12+1"), Some((10, 0)));
        assert!(major_minor("10.0.2") > Some(QEMU_MIN));
        assert_eq!(major_minor("none"), None);
    }

    #[test]
    fn a_program_with_an_interpreter_is_not_static() {
        let file = |kind: u8| {
            let mut bytes = vec![0u8; 0x40 + 56];
            bytes[..6].copy_from_slice(b"\x7fELF\x02\x01");
            bytes[0x20] = 0x40;
            bytes[0x36] = 56;
            bytes[0x38] = 1;
            bytes[0x40] = kind;
            bytes
        };
        assert_eq!(needs_interpreter(&file(3)), Some(true));
        assert_eq!(needs_interpreter(&file(1)), Some(false));
        assert_eq!(needs_interpreter(b"#!/bin/sh"), None);
        assert_eq!(needs_interpreter(&file(3)[..0x41]), None);
    }

    #[test]
    fn a_plan_that_takes_packages_away_is_refused() {
        let packages = ["qemu-system-x86".to_owned(), "busybox-static".to_owned()];
        let plan = |name: &str| Plan {
            install: Vec::new(),
            remove: vec![name.to_owned()],
        };
        assert!(harmless(&Plan::default(), &packages).is_ok());
        assert!(harmless(&plan("busybox"), &packages).is_ok());
        assert!(harmless(&plan("busybox"), &packages[..1]).is_err());
        let error = harmless(&plan("qemu-utils"), &packages).unwrap_err().to_string();
        assert_eq!(
            error,
            "installing qemu-system-x86 busybox-static would remove qemu-utils"
        );
    }

    #[test]
    fn libvirt_is_needed_only_to_measure_against_it() {
        let names = |purpose| {
            PROGRAMS
                .iter()
                .filter(|p| p.purposes.contains(&purpose))
                .map(|p| p.name)
                .collect::<Vec<_>>()
        };
        assert!(!names(Purpose::Demo).contains(&"virsh"));
        assert!(names(Purpose::Peers).contains(&"virsh"));
    }
}
