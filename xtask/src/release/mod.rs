//! `cargo xtask release`: what people install, from a clean build: binary, Debian package, manual pages, bill of materials, checksums.
//!
//! The same commit makes the same bytes: times in archives are the commit's, names are sorted, owners are root.

mod binary;
mod deb;
mod sbom;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use crate::run::{capture, cargo, root, run, target_dir};
use crate::setup::{self, Purpose};

/// What a release is made of.
struct Release {
    version: String,
    /// The commit's time, seconds since 1970.
    epoch: u64,
    /// The program.
    binary: PathBuf,
    /// What it needs of the system.
    needs: binary::Needs,
    /// Manual pages and completions, as `godwit documents` wrote them.
    documents: PathBuf,
    /// Where the files go.
    out: PathBuf,
}

/// Builds all and writes it to `out`, by default `target/dist`.
///
/// # Errors
/// When something is missing, does not build, or the program needs more of a system than Debian 12 has.
pub(crate) fn release(out: Option<PathBuf>, yes: bool) -> Result<()> {
    setup::ensure(Purpose::Release, yes)?;
    let target = target_dir()?;
    let epoch = commit_time()?;
    println!("build: godwit");
    run(cargo().args(["build", "--locked", "--release", "-p", "godwit"]))?;
    let binary = target.join("release/godwit");
    let documents = target.join("documents");
    made_anew(&documents)?;
    run(Command::new(&binary).arg("documents").arg(&documents))?;
    let out = out.unwrap_or_else(|| target.join("dist"));
    made_anew(&out)?;
    let release = Release {
        version: version()?,
        epoch,
        needs: binary::needs(&binary)?,
        binary,
        documents,
        out,
    };
    let files = [deb::write(&release)?, archive(&release)?, sbom::write(&release)?];
    checksums(&release, &files)?;
    println!("{} files in {}", files.len() + 1, release.out.display());
    Ok(())
}

/// An empty directory; what an earlier run left there is gone. Refuses one that no earlier run can have made.
fn made_anew(directory: &Path) -> Result<()> {
    const MARK: &str = ".made-by-xtask";
    if directory.exists() {
        let empty = fs::read_dir(directory)?.next().is_none();
        if !empty && !directory.join(MARK).exists() {
            bail!("{} is not empty; give another with --out", directory.display());
        }
        fs::remove_dir_all(directory)?;
    }
    fs::create_dir_all(directory)?;
    fs::write(directory.join(MARK), "")?;
    Ok(())
}

/// The binary with its pages, units and samples, for systems without Debian packages.
fn archive(release: &Release) -> Result<PathBuf> {
    let name = format!("godwit-{}-x86_64-linux", release.version);
    let staging = release.out.join("staging");
    let top = staging.join(&name);
    put(&release.binary, &top.join("godwit"), 0o755)?;
    put_tree(&release.documents.join("man"), &top.join("man"))?;
    put_tree(&release.documents.join("completion"), &top.join("completion"))?;
    put_tree(&root().join("packaging/systemd"), &top.join("systemd"))?;
    put_tree(&root().join("packaging/etc"), &top.join("etc"))?;
    for text in ["LICENSE", "README.md", "CHANGELOG.md"] {
        put(&root().join(text), &top.join(text), 0o644)?;
    }
    let file = release.out.join(format!("{name}.tar.gz"));
    run(Command::new("tar")
        .args([
            "--create",
            "--gzip",
            "--sort=name",
            "--owner=0",
            "--group=0",
            "--numeric-owner",
        ])
        .arg(format!("--mtime=@{}", release.epoch))
        .arg("--file")
        .arg(&file)
        .arg("--directory")
        .arg(&staging)
        .arg(&name))?;
    fs::remove_dir_all(&staging)?;
    Ok(file)
}

fn checksums(release: &Release, files: &[PathBuf]) -> Result<()> {
    let names = files.iter().filter_map(|file| file.file_name());
    let sums = capture(Command::new("sha256sum").args(names).current_dir(&release.out))?;
    print!("{sums}");
    fs::write(release.out.join("SHA256SUMS"), sums).context("cannot write SHA256SUMS")
}

/// Copies a file under a mode.
fn put(from: &Path, to: &Path, mode: u32) -> Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    let put = || {
        fs::create_dir_all(to.parent().unwrap_or(Path::new("/")))?;
        fs::copy(from, to)?;
        fs::set_permissions(to, fs::Permissions::from_mode(mode))
    };
    put().with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))
}

/// Copies the files of a directory, which has no others below.
fn put_tree(from: &Path, to: &Path) -> Result<()> {
    let entries = fs::read_dir(from).with_context(|| format!("cannot read {}", from.display()))?;
    for entry in entries {
        let entry = entry?;
        put(&entry.path(), &to.join(entry.file_name()), 0o644)?;
    }
    Ok(())
}

/// The workspace's version.
fn version() -> Result<String> {
    #[derive(Deserialize)]
    struct Manifest {
        workspace: Workspace,
    }
    #[derive(Deserialize)]
    struct Workspace {
        package: Package,
    }
    #[derive(Deserialize)]
    struct Package {
        version: String,
    }
    let text = fs::read_to_string(root().join("Cargo.toml"))?;
    let manifest: Manifest = toml::from_str(&text).context("cannot read Cargo.toml")?;
    Ok(manifest.workspace.package.version)
}

/// When the commit was made; it is the time of all that is packed.
fn commit_time() -> Result<u64> {
    let text = capture(
        Command::new("git")
            .args(["log", "-1", "--format=%ct"])
            .current_dir(root()),
    )?;
    text.trim().parse().context("git does not tell the commit's time")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_with_somebody_elses_files_is_not_emptied() {
        let directory = std::env::temp_dir().join(format!("godwit-release-{}", std::process::id()));
        fs::create_dir_all(&directory).unwrap();
        fs::write(directory.join("mine"), "x").unwrap();
        let refused = made_anew(&directory).unwrap_err().to_string();
        assert!(
            refused.contains("not empty") && directory.join("mine").exists(),
            "{refused}"
        );
        fs::remove_file(directory.join("mine")).unwrap();
        made_anew(&directory).unwrap();
        fs::write(directory.join("old"), "x").unwrap();
        made_anew(&directory).unwrap();
        assert!(!directory.join("old").exists());
        fs::remove_dir_all(&directory).unwrap();
    }
}
