//! What the program needs of the system that it runs on: as little as can be, and no more than the oldest supported one has.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::run::capture;

/// The libraries it may need: the C library's own. All else is in the program.
const LIBRARIES: &[&str] = &["libc.so.6", "libm.so.6", "libgcc_s.so.1", "ld-linux-x86-64.so.2"];

/// The C library of Debian 12.
const GLIBC_MAX: (u32, u32) = (2, 36);

/// What the program needs of the system.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Needs {
    /// The oldest C library that it runs with.
    pub(super) glibc: (u32, u32),
}

/// Reads it from the program's own headers.
///
/// # Errors
/// When it needs another library than the C library's, or a newer one than Debian 12 has.
pub(super) fn needs(program: &Path) -> Result<Needs> {
    let dynamic = capture(Command::new("readelf").args(["--wide", "--dynamic"]).arg(program))?;
    let versions = capture(Command::new("readelf").args(["--wide", "--version-info"]).arg(program))?;
    let strange: Vec<&str> = libraries(&dynamic).filter(|one| !LIBRARIES.contains(one)).collect();
    if !strange.is_empty() {
        bail!(
            "{} needs {}, which not every system has; link it in",
            program.display(),
            strange.join(", ")
        );
    }
    let glibc = newest_glibc(&versions).context("the program names no version of the C library")?;
    if glibc > GLIBC_MAX {
        let ((major, minor), (max_major, max_minor)) = (glibc, GLIBC_MAX);
        bail!(
            "{} needs glibc {major}.{minor}, and Debian 12 has {max_major}.{max_minor}; make the release on Debian 12",
            program.display()
        );
    }
    Ok(Needs { glibc })
}

/// The names in ` 0x... (NEEDED)  Shared library: [libc.so.6]`.
fn libraries(dynamic: &str) -> impl Iterator<Item = &str> {
    dynamic
        .lines()
        .filter(|line| line.contains("(NEEDED)"))
        .filter_map(|line| {
            let (_, rest) = line.split_once('[')?;
            rest.split(']').next()
        })
}

/// The greatest of `Name: GLIBC_2.34`.
fn newest_glibc(versions: &str) -> Option<(u32, u32)> {
    let named = versions.split("GLIBC_").skip(1);
    let pairs = named.filter_map(|rest| {
        let end = rest
            .find(|c: char| !c.is_ascii_digit() && c != '.')
            .unwrap_or(rest.len());
        let mut numbers = rest[..end].split('.').map(str::parse);
        Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
    });
    pairs.max()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_and_versions_are_read_from_what_readelf_prints() {
        let dynamic = " 0x0001 (NEEDED)             Shared library: [libgcc_s.so.1]\n 0x0001 (NEEDED)  Shared library: [libssl.so.3]\n 0x0c (INIT) 0x1000\n";
        assert_eq!(libraries(dynamic).collect::<Vec<_>>(), ["libgcc_s.so.1", "libssl.so.3"]);
        let versions = "  0x0010:   Name: GLIBC_2.9  Flags: none\n  Name: GLIBC_2.34  Flags: none\n Name: GLIBC_2.2.5 Flags: none\n";
        assert_eq!(newest_glibc(versions), Some((2, 34)));
        assert_eq!(newest_glibc("Name: GCC_3.0"), None);
    }

    #[test]
    fn a_program_that_needs_more_is_refused() {
        // The shell of every Debian needs nothing but the C library; its package manager needs its own.
        assert!(needs(Path::new("/bin/sh")).is_ok());
        let refused = needs(Path::new("/usr/bin/apt-get")).unwrap_err().to_string();
        assert!(refused.contains("libapt-pkg"), "{refused}");
    }
}
