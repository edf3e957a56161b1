//! The tree of files: packages by mmdebstrap, and the few files that make a cloud server of them.

use super::{BuildError, Progress, Step, Suite, as_root, failed, grub, sources, write};
use crate::process::{Run, RunError};
use rustix::fs::{FlockOperation, flock};
use sha2::{Digest as _, Sha256};
use std::fs::{DirBuilder, File, Permissions};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Downloading and installing, on a slow line and a busy machine.
const INSTALL_S_MAX: u64 = 3600;
const UNPACK: Duration = Duration::from_secs(600);
/// Packages of older builds are dropped when the cache has grown to this.
const CACHE_BYTES_MAX: u64 = 1 << 30;

/// What is installed beside Debian's essential packages.
pub(super) const PACKAGES: &[&str] = &[
    "linux-image-cloud-amd64",
    "initramfs-tools",
    "zstd",
    "kmod",
    "udev",
    "e2fsprogs", // starts
    "systemd-sysv",
    "systemd-resolved",
    "systemd-timesyncd",
    "dbus", // runs
    "cloud-init",
    "cloud-guest-utils",
    "fdisk",
    "qemu-guest-agent", // is told who it is, and grows
    "openssh-server",
    "sudo",
    "nginx", // serves
    "ca-certificates",
    "iproute2",
    "iputils-ping",
    "netbase",
    "procps",
    "less", // is looked after
];

/// Left out of every package: a server's manuals are on the web.
const LEFT_OUT: &[&str] = &[
    "path-exclude=/usr/share/doc/*",
    "path-include=/usr/share/doc/*/copyright",
    "path-exclude=/usr/share/man/*",
    "path-exclude=/usr/share/locale/*",
];

/// Files written over the packages' own: path, contents.
pub(super) const FILES: &[(&str, &str)] = &[
    // Without a seed it starts too, at once: no datasource that asks the network is tried.
    ("etc/cloud/cloud.cfg.d/90_godwit.cfg", CLOUD),
    ("etc/fstab", "LABEL=rootfs / ext4 defaults,errors=remount-ro 0 1\n"),
    ("etc/hostname", "debian\n"),
    // Empty: each VM makes its own at its first start.
    ("etc/machine-id", ""),
    ("boot/grub/grub.cfg", grub::MENU),
    (
        "etc/systemd/system/systemd-networkd-wait-online.service.d/godwit.conf",
        ONLINE,
    ),
];

/// Two minutes for a network that may not be there hold up logins too; one card with an address is enough.
const ONLINE: &str = "\
[Service]
ExecStart=
ExecStart=/lib/systemd/systemd-networkd-wait-online --any --timeout=20
";

const CLOUD: &str = "\
datasource_list: [ NoCloud, None ]
manage_etc_hosts: true
ssh_pwauth: false
locale: false
ssh_genkeytypes: [ ed25519, ecdsa, rsa ]
system_info:
  network:
    renderers: [ networkd ]
";

/// Downloaded packages, kept from one build to the next. One build at a time.
#[derive(Debug)]
pub(super) struct Cache {
    path: PathBuf,
    _lock: File,
}

impl Cache {
    /// Opens it, made when absent; waits while another build uses it.
    ///
    /// # Errors
    /// When it cannot be made or written.
    pub(super) fn open(path: &Path, progress: &mut dyn FnMut(Progress)) -> Result<Self, BuildError> {
        std::fs::create_dir_all(path).map_err(failed("create", path))?;
        let at = path.with_extension("lock");
        let lock = File::create(&at).map_err(failed("open", &at))?;
        if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
            progress(Progress::of(Step::Prepare, "waiting for another build of Debian"));
            flock(&lock, FlockOperation::LockExclusive).map_err(|error| failed("lock", &at)(error.into()))?;
        }
        let entries = || std::fs::read_dir(path).into_iter().flatten().flatten();
        let bytes: u64 = entries().filter_map(|entry| Some(entry.metadata().ok()?.len())).sum();
        if bytes > CACHE_BYTES_MAX {
            // What stays behind is only not fetched again.
            entries().for_each(|entry| drop(std::fs::remove_file(entry.path())));
        }
        Ok(Self {
            path: path.into(),
            _lock: lock,
        })
    }
}

/// A finished tree.
#[derive(Debug)]
pub(super) struct Tree {
    /// Its root.
    pub(super) path: PathBuf,
    /// The kernel's release.
    pub(super) kernel: String,
    /// How many packages it has.
    pub(super) packages: usize,
    /// What it was made of, as a digest: equal packages give equal ids of disk and partitions.
    pub(super) seed: [u8; 32],
}

/// Makes the tree in `scratch/root`.
///
/// # Errors
/// When packages cannot be had or installed.
pub(super) fn make(
    scratch: &Path,
    suite: Suite,
    lines: &[String],
    cache: &Cache,
    progress: &mut dyn FnMut(Progress),
) -> Result<Tree, BuildError> {
    let archive = scratch.join("root.tar");
    install(scratch, &archive, suite, lines, cache, progress)?;
    progress(Progress::of(Step::Packages, "unpacking the tree"));
    let path = scratch.join("root");
    std::fs::create_dir(&path).map_err(failed("create", &path))?;
    // The guest makes its own devices, and outside root nobody may.
    let unpack = as_root("tar", UNPACK)
        .arg("--extract")
        .arg("--numeric-owner")
        .arg("--exclude=./dev/*")
        .arg("--directory")
        .arg(&path)
        .arg("--file")
        .arg(&archive);
    unpack.output().map_err(BuildError::program("unpack the tree"))?;
    std::fs::remove_file(&archive).map_err(failed("remove", &archive))?;
    remove_identity(&path)?;
    overlay(scratch, &path, lines)?;
    describe(path)
}

fn install(
    scratch: &Path,
    archive: &Path,
    suite: Suite,
    lines: &[String],
    cache: &Cache,
    progress: &mut dyn FnMut(Progress),
) -> Result<(), BuildError> {
    let list = scratch.join("debian.list");
    write(&list, (lines.join("\n") + "\n").as_bytes())?;
    let cache = quoted(&cache.path);
    // `timeout` asks it to end, so that it clears away what it made; a kill would not.
    let mut run = Run::new("timeout", Duration::from_secs(INSTALL_S_MAX + 120))
        .arg("--foreground")
        .arg("--kill-after=60")
        .arg(INSTALL_S_MAX.to_string())
        .args([
            "mmdebstrap",
            "--variant=minbase",
            "--format=tar",
            "--architectures=amd64",
        ])
        .arg("--aptopt=Apt::Install-Recommends \"0\"")
        // Its own way to keep downloads (mmdebstrap(1), EXAMPLES).
        .args(["--skip=download/empty", "--skip=essential/unlink"])
        .arg("--setup-hook=mkdir -p \"$1\"/var/cache/apt/archives")
        .arg(format!("--setup-hook=sync-in {cache} /var/cache/apt/archives"))
        .arg(format!("--customize-hook=sync-out /var/cache/apt/archives {cache}"))
        .arg("--customize-hook=chroot \"$1\" systemctl --quiet enable systemd-networkd")
        .arg(format!("--include={}", PACKAGES.join(",")));
    for rule in LEFT_OUT {
        run = run.arg(format!("--dpkgopt={rule}"));
    }
    for option in proxy() {
        run = run.arg(format!("--aptopt={option}"));
    }
    let run = run.arg(suite.codename()).arg(archive).arg(&list);
    let mut told = Lines::default();
    progress(Progress::of(Step::Packages, "asking the archives"));
    let ran = run.env("TMPDIR", scratch).merged().output_seen(&mut |piece| {
        told.take(piece, &mut |line| {
            if let Some(detail) = doing(line) {
                progress(Progress::of(Step::Packages, detail));
            }
        });
    });
    ran.map(drop)
        .map_err(|error| BuildError::Packages(pointed(error, &told)))
}

/// What of mmdebstrap's remarks people may want to know: what takes time.
fn doing(line: &str) -> Option<&str> {
    let detail = line.strip_prefix("I: ")?.trim_end_matches('.');
    let plain = [
        "running apt",
        "downloading",
        "extracting",
        "installing",
        "cleaning",
        "creating",
    ];
    plain.iter().any(|word| detail.starts_with(word)).then_some(detail)
}

/// This machine's way to the network: mmdebstrap does not read apt's own configuration.
fn proxy() -> Vec<String> {
    let run = Run::new("apt-config", Duration::from_secs(60))
        .arg("dump")
        .arg("Acquire");
    let dump = run.output().unwrap_or_default();
    let lines = String::from_utf8_lossy(&dump);
    let options = lines.lines().filter(|line| {
        let name = line.split_once(' ').map_or("", |(name, _)| name).to_ascii_lowercase();
        name.starts_with("acquire::http") && name.contains("::proxy") && !line.ends_with("\"\";")
    });
    options.map(|line| line.trim_end_matches(';').to_owned()).collect()
}

/// mmdebstrap ends with remarks on its own end; the first complaint is what people need.
fn pointed(error: RunError, told: &Lines) -> RunError {
    match error {
        RunError::Failed { status, .. } if !told.complaint.is_empty() => RunError::Failed {
            program: "mmdebstrap".into(),
            status,
            complaint: told.complaint.clone(),
        },
        other => other,
    }
}

/// Whole lines of pieces of output, and the first complaint among them.
#[derive(Default)]
struct Lines {
    rest: Vec<u8>,
    complaint: String,
}

impl Lines {
    const LINE_BYTES_MAX: usize = 4096;

    fn take(&mut self, piece: &[u8], see: &mut dyn FnMut(&str)) {
        for &byte in piece {
            if byte != b'\n' && byte != b'\r' {
                if self.rest.len() < Self::LINE_BYTES_MAX {
                    self.rest.push(byte);
                }
                continue;
            }
            let line: String = String::from_utf8_lossy(&self.rest)
                .chars()
                .filter(|c| !c.is_control())
                .collect();
            self.rest.clear();
            if self.complaint.is_empty() && (line.starts_with("E: ") || line.starts_with("dpkg: error")) {
                self.complaint = line.trim_start_matches("E: ").chars().take(400).collect();
            }
            see(&line);
        }
    }
}

/// A path as one word of a hook, which mmdebstrap splits as a shell would.
fn quoted(path: &Path) -> String {
    format!("'{}'", path.to_string_lossy().replace('\'', "'\\''"))
}

/// Removes what makes this tree one particular machine, and what only the build needed.
fn remove_identity(root: &Path) -> Result<(), BuildError> {
    let ssh = root.join("etc/ssh");
    let entries = std::fs::read_dir(&ssh).map_err(failed("read", &ssh))?.flatten();
    let keys = entries.filter(|entry| entry.file_name().to_string_lossy().starts_with("ssh_host_"));
    let mut run = as_root("rm", UNPACK).arg("--force").arg("--");
    for path in keys.map(|entry| entry.path()) {
        run = run.arg(path);
    }
    for name in [
        "var/lib/dbus/machine-id",
        "var/lib/systemd/random-seed",
        "etc/apt/apt.conf.d/99mmdebstrap",
        "etc/apt/sources.list.d/0000debian.list",
    ] {
        run = run.arg(root.join(name));
    }
    run.output().map(drop).map_err(BuildError::program("clear the tree"))
}

/// Lays our files over the tree, owned by root.
fn overlay(scratch: &Path, root: &Path, lines: &[String]) -> Result<(), BuildError> {
    let over = scratch.join("over");
    let sources: Vec<String> = lines
        .iter()
        .map(|line| sources::without_credentials(line) + "\n")
        .collect();
    let sources = [("etc/apt/sources.list", sources.concat())];
    let files = FILES.iter().map(|&(path, text)| (path, text.to_owned())).chain(sources);
    for (path, text) in files {
        let path = over.join(path);
        let directory = path.parent().unwrap_or(&over);
        let made = DirBuilder::new().recursive(true).mode(0o755).create(directory);
        made.map_err(failed("create", directory))?;
        write(&path, text.as_bytes())?;
        std::fs::set_permissions(&path, Permissions::from_mode(0o644)).map_err(failed("write", &path))?;
    }
    // Directories that are there keep their modes: only files' are carried over.
    let copy = as_root("cp", UNPACK)
        .arg("--recursive")
        .arg("--no-target-directory")
        .arg("--remove-destination")
        .arg(over)
        .arg(root);
    copy.output()
        .map(drop)
        .map_err(BuildError::program("write the server's files"))
}

fn describe(path: PathBuf) -> Result<Tree, BuildError> {
    let link = std::fs::read_link(path.join("vmlinuz")).map_err(|_| BuildError::NoKernel)?;
    let name = link.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let kernel = name.strip_prefix("vmlinuz-").ok_or(BuildError::NoKernel)?.to_owned();
    if !path.join(format!("boot/initrd.img-{kernel}")).is_file() {
        return Err(BuildError::NoKernel);
    }
    let database = path.join("var/lib/dpkg/status");
    let status = std::fs::read_to_string(&database).map_err(failed("read", &database))?;
    let packages = status.lines().filter(|line| line.starts_with("Package: ")).count();
    Ok(Tree {
        path,
        kernel,
        packages,
        seed: Sha256::digest(&status).into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_seen_whole_and_the_first_complaint_is_kept() {
        let (mut lines, mut seen) = (Lines::default(), Vec::new());
        for piece in [
            "I: run",
            "ning\nE: no \u{1b}[31mnet",
            "work\nE: setup failed\nI: removing",
        ] {
            lines.take(piece.as_bytes(), &mut |line| seen.push(line.to_owned()));
        }
        assert_eq!(seen, ["I: running", "E: no [31mnetwork", "E: setup failed"]);
        assert_eq!(lines.complaint, "no [31mnetwork");
    }

    #[test]
    fn a_path_is_one_word_of_a_hook() {
        assert_eq!(quoted(Path::new("/a b/it's")), r"'/a b/it'\''s'");
    }

    #[test]
    fn a_cache_that_has_grown_is_emptied_and_serves_one_build_at_a_time() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("bookworm");
        let held = Cache::open(&path, &mut |_| ()).unwrap();
        let file = File::create(path.join("a.deb")).unwrap();
        file.set_len(CACHE_BYTES_MAX + 1).unwrap();
        let (told, tell) = std::sync::mpsc::channel();
        let other = std::thread::spawn(move || Cache::open(&path, &mut |p| drop(told.send(p.detail))).map(|c| c.path));
        assert!(tell.recv().unwrap().contains("another build"));
        drop(held);
        let path = other.join().unwrap().unwrap();
        assert_eq!(std::fs::read_dir(path).unwrap().count(), 0);
    }
}
