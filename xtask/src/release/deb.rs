//! The Debian package: the program, its units, pages, completions and samples of configuration.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::{Release, put, put_tree};
use crate::run::{capture, root, run};

/// Without these it drives nothing.
const DEPENDS: &str = "qemu-system-x86 (>= 1:7.2), qemu-utils, iproute2, nftables, util-linux";
/// With these guests boot by UEFI, templates are built, and hosts are added over SSH.
const RECOMMENDS: &str =
    "ovmf, busybox-static, zstd, mmdebstrap, e2fsprogs, mtools, grub-pc-bin, grub-efi-amd64-bin, openssh-client";

/// Packs it.
///
/// # Errors
/// When a file cannot be written or `dpkg-deb` refuses.
pub(super) fn write(release: &Release) -> Result<PathBuf> {
    let tree = release.out.join("deb");
    let usr = tree.join("usr");
    put(&release.binary, &usr.join("bin/godwit"), 0o755)?;
    put_tree(&root().join("packaging/systemd"), &tree.join("lib/systemd/system"))?;
    put_tree(&root().join("packaging/etc"), &tree.join("etc/godwit"))?;
    let completion = release.documents.join("completion");
    put(
        &completion.join("godwit"),
        &usr.join("share/bash-completion/completions/godwit"),
        0o644,
    )?;
    put(
        &completion.join("_godwit"),
        &usr.join("share/zsh/vendor-completions/_godwit"),
        0o644,
    )?;
    put(
        &completion.join("godwit.fish"),
        &usr.join("share/fish/vendor_completions.d/godwit.fish"),
        0o644,
    )?;
    let doc = usr.join("share/doc/godwit");
    put(&root().join("packaging/deb/copyright"), &doc.join("copyright"), 0o644)?;
    packed(&root().join("CHANGELOG.md"), &doc.join("changelog.gz"))?;
    for page in fs::read_dir(release.documents.join("man"))? {
        let page = page?;
        let name = format!("{}.gz", page.file_name().to_string_lossy());
        packed(&page.path(), &usr.join("share/man/man1").join(name))?;
    }
    control(release, &tree)?;
    let file = release.out.join(format!("godwit_{}_amd64.deb", release.version));
    run(Command::new("dpkg-deb")
        .args(["--root-owner-group", "-Zxz", "--build"])
        .arg(&tree)
        .arg(&file)
        .env("SOURCE_DATE_EPOCH", release.epoch.to_string()))?;
    fs::remove_dir_all(&tree)?;
    Ok(file)
}

fn control(release: &Release, tree: &Path) -> Result<()> {
    let debian = tree.join("DEBIAN");
    for script in ["postinst", "prerm", "postrm"] {
        put(&root().join("packaging/deb").join(script), &debian.join(script), 0o755)?;
    }
    let files = capture(Command::new("find").arg("etc").args(["-type", "f"]).current_dir(tree))?;
    let mut conffiles: Vec<String> = files.lines().map(|line| format!("/{line}\n")).collect();
    conffiles.sort();
    fs::write(debian.join("conffiles"), conffiles.concat())?;
    let size = capture(
        Command::new("du")
            .args(["--summarize", "--apparent-size", "--block-size=1K"])
            .arg(tree),
    )?;
    let size = size.split_whitespace().next().context("du names no size")?;
    let (major, minor) = release.needs.glibc;
    let text = format!(
        "Package: godwit\n\
         Version: {}\n\
         Section: admin\n\
         Priority: optional\n\
         Architecture: amd64\n\
         Depends: libc6 (>= {major}.{minor}), libgcc-s1, {DEPENDS}\n\
         Recommends: {RECOMMENDS}\n\
         Installed-Size: {size}\n\
         Maintainer: Godwit developers <godwit@localhost>\n\
         Description: provisions virtual machines and moves them while they run\n \
         One program: a controller, an agent on each host that drives QEMU, and a\n \
         command line. VMs move between hosts without their users noticing, and\n \
         never run twice, whatever crashes.\n",
        release.version
    );
    fs::write(debian.join("control"), text).context("cannot write the package's control file")
}

/// A text compressed as Debian's policy wants it (12.1, 12.3): without name and time, so that it is the same each time.
fn packed(from: &Path, to: &Path) -> Result<()> {
    let bytes = Command::new("gzip")
        .args(["--best", "--no-name", "--stdout"])
        .arg(from)
        .output()
        .context("cannot start gzip")?;
    fs::create_dir_all(to.parent().unwrap_or(Path::new("/")))?;
    let mut file = fs::File::create(to).with_context(|| format!("cannot write {}", to.display()))?;
    file.write_all(&bytes.stdout)?;
    Ok(())
}
