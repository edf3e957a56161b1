//! Installing Debian packages: plan by simulation, then install, leaving apt's configuration as it was.
//!
//! The trap this file exists for: QEMU's tools may have come from backports while backports is no longer among apt's
//! sources. A plain install of the emulator then fits no versions together, or would remove the tools. The way out is
//! one call that sees backports through a sources list and package lists of its own, which are removed afterwards.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::run::{capture, is_root, succeeds};

/// What apt would do, by its own simulation.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Plan {
    /// Package and version, in the order of installation.
    pub(crate) install: Vec<(String, String)>,
    /// Packages that would be taken away.
    pub(crate) remove: Vec<String>,
}

impl Plan {
    /// Reads `Inst NAME [OLD] (VERSION ORIGIN [ARCH])` and `Remv NAME [OLD]` lines of `apt-get -s`.
    fn parse(text: &str) -> Self {
        let mut plan = Self::default();
        for line in text.lines() {
            let mut words = line.split(' ');
            match (words.next(), words.next()) {
                (Some("Inst"), Some(name)) => {
                    let version = line.split_once('(').and_then(|(_, rest)| rest.split([' ', ')']).next());
                    plan.install
                        .push((name.to_owned(), version.unwrap_or_default().to_owned()));
                }
                (Some("Remv"), Some(name)) => plan.remove.push(name.to_owned()),
                _ => {}
            }
        }
        plan
    }
}

/// Which package lists a call of apt sees.
#[derive(Default)]
pub(crate) struct Sources {
    options: Vec<String>,
    release: Option<String>,
    scratch: Option<Scratch>,
}

/// A folder below the temporary one, removed when dropped.
struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        // Nothing is owed to anyone: a leftover below the temporary folder is harmless.
        let _ = fs::remove_dir_all(&self.0);
    }
}

impl Sources {
    /// What the system's administrator configured.
    pub(crate) fn system() -> Self {
        Self::default()
    }

    /// The system's own sources and its release's backports beside them, for the calls made through this value.
    ///
    /// # Errors
    /// When the system is not Debian, has no mirror configured, or its mirror has no backports.
    pub(crate) fn with_backports() -> Result<Self> {
        let targets = targets()?;
        let codename = codename()?;
        let release = format!("{codename}-backports");
        if targets.iter().any(|target| target.release == release) {
            return Ok(Self {
                release: Some(release),
                ..Self::default()
            });
        }
        let mirror = targets
            .iter()
            .find(|target| target.release == codename && target.component == "main")
            .with_context(|| format!("no mirror of {codename}/main is among apt's sources"))?;
        let scratch = Scratch(std::env::temp_dir().join(format!("godwit-apt-{}", std::process::id())));
        let (parts, lists) = (scratch.0.join("parts"), scratch.0.join("lists"));
        copy_files(&config("Dir::Etc::sourceparts/d")?, &parts)?;
        copy_files(&config("Dir::State::lists/d")?, &lists)?;
        fs::create_dir_all(lists.join("partial"))?;
        fs::set_permissions(&scratch.0, fs::Permissions::from_mode(0o755))?;
        let extra = parts.join("godwit-backports.list");
        fs::write(&extra, source_line(&mirror.uri, &release, &keyring()))?;

        // Only the added list is fetched; the copied ones stay as they are.
        let mut update = apt_get();
        update
            .arg("update")
            .args(["-o", &format!("Dir::Etc::sourcelist={}", extra.display())])
            .args([
                "-o",
                "Dir::Etc::sourceparts=/dev/null",
                "-o",
                "APT::Get::List-Cleanup=false",
            ])
            .args(["-o", &format!("Dir::State::lists={}", lists.display())])
            .args(NO_CACHE)
            .args(["-o", "APT::Update::Error-Mode=any"]);
        capture(&mut update).with_context(|| format!("cannot fetch the package list of {release}"))?;
        let mut options: Vec<String> = NO_CACHE.iter().map(|&word| word.to_owned()).collect();
        options.extend(["-o".to_owned(), format!("Dir::Etc::sourceparts={}", parts.display())]);
        options.extend(["-o".to_owned(), format!("Dir::State::lists={}", lists.display())]);
        Ok(Self {
            options,
            release: Some(release),
            scratch: Some(scratch),
        })
    }

    /// Whether the calls made through this value see lists that the system's configuration does not name.
    pub(crate) fn is_temporary(&self) -> bool {
        self.scratch.is_some()
    }

    /// What apt would do to install these, with the system's own record of installed packages.
    ///
    /// # Errors
    /// Apt's own words when there is no way to install them.
    pub(crate) fn simulate(&self, packages: &[String]) -> Result<Plan> {
        self.simulate_on(packages, None)
    }

    /// The same on another record of installed packages (a file in the form of dpkg's `status`).
    ///
    /// # Errors
    /// Apt's own words when there is no way to install them.
    pub(crate) fn simulate_on(&self, packages: &[String], status: Option<&Path>) -> Result<Plan> {
        let mut command = apt_get();
        command.arg("-s");
        if let Some(status) = status {
            command.args(["-o", &format!("Dir::State::status={}", status.display())]);
        }
        self.install_words(&mut command, packages);
        Ok(Plan::parse(&capture(&mut command)?))
    }

    /// The command that installs these packages; it has to run as root.
    pub(crate) fn install(&self, packages: &[String]) -> Command {
        let mut command = apt_get();
        self.install_words(&mut command, packages);
        command
    }

    /// The versions of a package that can be had, as apt lists them.
    ///
    /// # Errors
    /// When apt's cache cannot be read.
    pub(crate) fn versions(&self, package: &str) -> Result<Vec<String>> {
        let mut command = Command::new("apt-cache");
        command
            .env("LC_ALL", "C")
            .args(&self.options)
            .args(["madison", package]);
        let text = capture(&mut command)?;
        Ok(text
            .lines()
            .filter_map(|line| line.split('|').nth(1))
            .map(|word| word.trim().to_owned())
            .collect())
    }

    /// Downloads the named versions into a folder.
    ///
    /// # Errors
    /// When one of them cannot be fetched or does not match the signed lists.
    pub(crate) fn download(&self, packages: &[(String, String)], into: &Path) -> Result<()> {
        let mut command = apt_get();
        command.current_dir(into).args(&self.options);
        if is_root() {
            // The folder belongs to root, and apt's own user could not write there.
            command.args(["-o", "APT::Sandbox::User=root"]);
        }
        command
            .arg("download")
            .args(packages.iter().map(|(name, version)| format!("{name}={version}")));
        capture(&mut command).map(drop)
    }

    fn install_words(&self, command: &mut Command, packages: &[String]) {
        command
            .args(["-y", "--no-install-recommends", "-o", "DPkg::Lock::Timeout=120"])
            .args(&self.options);
        if let Some(release) = &self.release {
            command.args(["-t", release]);
        }
        command.arg("install").args(packages);
    }
}

/// The command that brings the system's own package lists up to date; it has to run as root.
pub(crate) fn update() -> Command {
    let mut command = apt_get();
    command.args(["-o", "DPkg::Lock::Timeout=120", "update"]);
    command
}

/// Whether apt failed because its lists do not know a package (yet).
pub(crate) fn lists_are_old(message: &str) -> bool {
    [
        "Unable to locate package",
        "has no installation candidate",
        "Couldn't find any package",
    ]
    .iter()
    .any(|words| message.contains(words))
}

/// Whether Ubuntu's `universe` is missing here: most of what virtual machines need lives there.
pub(crate) fn universe_is_off() -> bool {
    matches!(distribution().as_deref(), Ok("ubuntu"))
        && targets().is_ok_and(|targets| targets.iter().all(|target| target.component != "universe"))
}

/// `ID` of /etc/os-release.
///
/// # Errors
/// When the file is missing or names none.
pub(crate) fn distribution() -> Result<String> {
    os_release("ID")
}

/// The value of a path in apt's configuration.
///
/// # Errors
/// When apt is not there or the value is empty.
pub(crate) fn config(name: &str) -> Result<PathBuf> {
    let text = capture(Command::new("apt-config").args(["shell", "VALUE", name]))?;
    let value = text
        .trim()
        .strip_prefix("VALUE='")
        .and_then(|rest| rest.strip_suffix('\''));
    value
        .map(PathBuf::from)
        .with_context(|| format!("apt's configuration has no {name}"))
}

/// Keeps a call from writing its mixed view of the world into the system's cache.
const NO_CACHE: [&str; 4] = ["-o", "Dir::Cache::pkgcache=", "-o", "Dir::Cache::srcpkgcache="];

struct Target {
    uri: String,
    release: String,
    component: String,
}

fn targets() -> Result<Vec<Target>> {
    let form = "$(REPO_URI)\t$(RELEASE)\t$(COMPONENT)";
    let text = capture(apt_get().args(["indextargets", "--format", form, "Created-By: Packages"]))?;
    Ok(text.lines().filter_map(parse_target).collect())
}

fn parse_target(line: &str) -> Option<Target> {
    let mut words = line.split('\t').map(str::to_owned);
    Some(Target {
        uri: words.next()?,
        release: words.next()?,
        component: words.next()?,
    })
}

fn codename() -> Result<String> {
    let id = distribution()?;
    if id != "debian" {
        bail!("backports are Debian's, and this is {id}");
    }
    os_release("VERSION_CODENAME")
}

fn os_release(key: &str) -> Result<String> {
    let text = fs::read_to_string("/etc/os-release").context("cannot read /etc/os-release")?;
    let value = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
    value
        .map(|word| word.trim_matches('"').to_owned())
        .with_context(|| format!("/etc/os-release has no {key}"))
}

fn keyring() -> Option<&'static str> {
    let file = "/usr/share/keyrings/debian-archive-keyring.gpg";
    Path::new(file).exists().then_some(file)
}

fn source_line(uri: &str, release: &str, keyring: &Option<&str>) -> String {
    let signed = keyring.map(|file| format!("[signed-by={file}] ")).unwrap_or_default();
    format!("deb {signed}{uri} {release} main\n")
}

fn copy_files(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to).with_context(|| format!("cannot create {}", to.display()))?;
    for entry in fs::read_dir(from).with_context(|| format!("cannot read {}", from.display()))? {
        let entry = entry?;
        if entry.file_type()?.is_file() && entry.file_name() != "lock" {
            fs::copy(entry.path(), to.join(entry.file_name()))
                .with_context(|| format!("cannot copy {}", entry.path().display()))?;
        }
    }
    Ok(())
}

fn apt_get() -> Command {
    let mut command = Command::new("apt-get");
    command.env("DEBIAN_FRONTEND", "noninteractive").env("LC_ALL", "C");
    command
}

/// Whether apt is there at all.
pub(crate) fn is_here() -> bool {
    succeeds(apt_get().arg("--version"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_simulation_tells_versions_and_removals() {
        let text = "Reading package lists...\nRemv qemu-utils [1:10.0.2]\n\
                    Inst seabios (1.16.2-1 Debian:12.15/oldstable [all])\n\
                    Inst zlib1g [1:1.2.13] (1:1.3 Debian:12 [amd64])\nConf seabios (1.16.2-1 Debian [all])\n";
        let plan = Plan::parse(text);
        assert_eq!(
            plan.install,
            [("seabios".into(), "1.16.2-1".into()), ("zlib1g".into(), "1:1.3".into())]
        );
        assert_eq!(plan.remove, ["qemu-utils"]);
    }

    #[test]
    fn an_added_source_is_signed_by_debians_own_keys() {
        let line = source_line("http://mirror/debian/", "bookworm-backports", &Some("/k.gpg"));
        assert_eq!(
            line,
            "deb [signed-by=/k.gpg] http://mirror/debian/ bookworm-backports main\n"
        );
    }

    #[test]
    fn only_unknown_packages_call_for_new_lists() {
        assert!(lists_are_old("E: Unable to locate package qemu-system-x86"));
        assert!(!lists_are_old(
            "E: Unable to correct problems, you have held broken packages."
        ));
    }

    #[test]
    fn a_temporary_source_leaves_nothing_behind() {
        let dir = std::env::temp_dir().join(format!("godwit-apt-test-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join("a.list"), "").unwrap();
        drop(Scratch(dir.clone()));
        assert!(!dir.exists());
    }
}
