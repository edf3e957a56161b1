//! One host of the lab: its namespaces, what it sees, its power and its cables.

use super::procs::{Belongs, namespace_inode};
use super::{Lab, LabConfig, net, spawn};
use crate::run::run;
use anyhow::{Context, Result};
use std::ffi::OsString;
use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Child;

/// A host: its own network and mount namespace. Inside it are
/// `/var/lib/godwit` (its disk), `/run/godwit` (gone at power loss),
/// `/srv/godwit/shared` (the pool all hosts share), `/srv/godwit/local`, and
/// a boot id of its own; `u0` is its cable to the other hosts, `vm0` the one
/// for guests.
#[derive(Debug)]
pub struct Host {
    number: u8,
    name: String,
    lab_id: String,
    dir: PathBuf,
    netns: PathBuf,
    address: Ipv4Addr,
    /// Sleeps for ever and keeps the mount namespace alive.
    holder: Child,
}

impl Host {
    pub(super) fn new(lab: &Lab, number: u8, config: &LabConfig) -> Result<Host> {
        let name = format!("h{number}");
        let dir = lab.dir.join(&name);
        for part in ["state", "run", "local", "bin", "private"] {
            fs::create_dir_all(dir.join(part)).context("cannot make the host's directories")?;
        }
        let netns = Path::new("/run/netns").join(net::netns(&lab.id, &name));
        let holder = spawn::holder(&netns, &lab.dir)?;
        let host = Host {
            number,
            name,
            lab_id: lab.id.clone(),
            dir,
            netns,
            address: lab.nets.underlay_ip(10 + number),
            holder,
        };
        host.new_boot_id()?;
        host.furnish(lab, config)?;
        Ok(host)
    }

    /// Its number, from 1.
    pub fn number(&self) -> u8 {
        self.number
    }

    /// Its name, `h1` ...
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its address on the underlay.
    pub fn address(&self) -> Ipv4Addr {
        self.address
    }

    /// Its own files as seen from this machine (`state`, `run`, `local`).
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Ids of its processes.
    ///
    /// # Errors
    /// When /proc cannot be read.
    pub fn processes(&self) -> Result<Vec<u32>> {
        let mut found = self.belongs().processes()?;
        found.retain(|pid| *pid != self.holder.id());
        Ok(found)
    }

    /// Loses power: the cables go dead first (a machine without power says
    /// goodbye to nobody), then every process is killed, then /run and all
    /// bridges and taps are gone.
    ///
    /// # Errors
    /// When something does not die.
    pub fn power_off(&self) -> Result<()> {
        net::plug(&self.lab_id, &self.name, false)?;
        self.belongs().kill(Some(self.holder.id()))?;
        net::forget_links(&self.lab_id, &self.name)?;
        empty(&self.dir.join("run"))
    }

    /// Power again: cables up, a new boot id, no process yet.
    ///
    /// # Errors
    /// When `ip` fails.
    pub fn power_on(&self) -> Result<()> {
        self.new_boot_id()?;
        net::plug(&self.lab_id, &self.name, true)
    }

    /// Cuts its cables while it goes on running.
    ///
    /// # Errors
    /// When `ip` fails.
    pub fn cut(&self) -> Result<()> {
        net::plug(&self.lab_id, &self.name, false)
    }

    /// Connects its cables again.
    ///
    /// # Errors
    /// When `ip` fails.
    pub fn heal(&self) -> Result<()> {
        net::plug(&self.lab_id, &self.name, true)
    }

    /// Makes its cable to the other hosts as fast as this and no faster, in what it sends; `None` lifts that.
    ///
    /// # Errors
    /// When the kernel has no token bucket filter (`sch_tbf`).
    pub fn shape(&self, mbit_per_s: Option<u32>) -> Result<()> {
        let namespace = net::netns(&self.lab_id, &self.name);
        // What is not there need not be taken away.
        let _ = run(&["tc", "-n", &namespace, "qdisc", "del", "dev", "u0", "root"]);
        let Some(rate) = mbit_per_s else { return Ok(()) };
        let rate = format!("{rate}mbit");
        let filter = ["root", "tbf", "rate", &rate, "burst", "256kb", "latency", "50ms"];
        let mut argv = vec!["tc", "-n", &namespace, "qdisc", "add", "dev", "u0"];
        argv.extend(filter);
        run(&argv).map(drop)
    }

    /// The words that put a command into this host.
    pub(super) fn enter(&self) -> Vec<OsString> {
        let mut net = OsString::from("--net=");
        net.push(&self.netns);
        let mount = format!("--mount=/proc/{}/ns/mnt", self.holder.id());
        vec!["nsenter".into(), net, mount.into(), "--".into()]
    }

    /// Collects the holder's exit status after its end.
    pub(super) fn reap(&mut self) {
        // It is dead already, or the removal failed and said so.
        let _ = self.holder.try_wait();
    }

    fn belongs(&self) -> Belongs {
        let mount = PathBuf::from(format!("/proc/{}/ns/mnt", self.holder.id()));
        Belongs {
            net: namespace_inode(&self.netns).into_iter().collect(),
            mount: namespace_inode(&mount).into_iter().collect(),
            mark: None,
        }
    }

    fn new_boot_id(&self) -> Result<()> {
        let id = fs::read_to_string("/proc/sys/kernel/random/uuid").context("cannot read a random id from /proc")?;
        // Written in place: the file is bound over /proc, its inode must stay.
        fs::write(self.dir.join("boot_id"), id).context("cannot write the host's boot id")
    }

    /// Mounts what the host sees. Bindings into the lab's directory come before
    /// that directory is hidden.
    fn furnish(&self, lab: &Lab, config: &LabConfig) -> Result<()> {
        let bin = self.dir.join("bin");
        for (name, path) in &config.programs {
            let place = bin.join(name);
            fs::write(&place, "").context("cannot make a place for a program")?;
            self.bind(path, &place)?;
        }
        let mut places = vec![
            (self.dir.join("state"), PathBuf::from("/var/lib/godwit")),
            (self.dir.join("run"), PathBuf::from("/run/godwit")),
            (self.dir.join("local"), PathBuf::from("/srv/godwit/local")),
            (lab.shared(), PathBuf::from("/srv/godwit/shared")),
            (bin, PathBuf::from("/run/godwit-bin")),
        ];
        for (index, path) in config.private.iter().enumerate() {
            let from = self.dir.join("private").join(index.to_string());
            if path.exists() {
                run(&["cp", "-a", &path.to_string_lossy(), &from.to_string_lossy()])?;
            } else {
                fs::create_dir(&from).context("cannot make a host's private directory")?;
            }
            places.push((from, path.clone()));
        }
        for fresh in ["/run", "/srv", "/var/lib", "/var/cache", "/var/log"] {
            self.mount(&["-t", "tmpfs", "-o", "mode=0755", "godwit-lab", fresh])?;
        }
        for (from, to) in &places {
            if !from.is_file() {
                self.inside(&["mkdir", "-p", &to.to_string_lossy()])?;
            }
            self.mount_from("--rbind", from, to)?;
        }
        let boot_id = Path::new("/proc/sys/kernel/random/boot_id");
        self.bind(&self.dir.join("boot_id"), boot_id)?;
        self.mount(&["-t", "sysfs", "godwit-lab", "/sys"])?;
        self.mount(&["-t", "tmpfs", "-o", "mode=0755", "godwit-lab", super::ROOT])
    }

    fn bind(&self, from: &Path, to: &Path) -> Result<()> {
        self.mount_from("--bind", from, to)
    }

    fn mount_from(&self, how: &str, from: &Path, to: &Path) -> Result<()> {
        self.mount(&[how, &from.to_string_lossy(), &to.to_string_lossy()])
    }

    fn mount(&self, arguments: &[&str]) -> Result<()> {
        let mut argv = vec!["mount"];
        argv.extend(arguments);
        self.inside(&argv)
            .with_context(|| format!("cannot furnish the host {}", self.name))
    }

    fn inside(&self, argv: &[&str]) -> Result<()> {
        let mut words = self.enter();
        words.extend(argv.iter().map(OsString::from));
        run(&words).map(drop)
    }
}

/// Removes what is in a directory, not the directory: it is mounted elsewhere.
fn empty(dir: &Path) -> Result<()> {
    let entries = fs::read_dir(dir).with_context(|| format!("cannot list {}", dir.display()))?;
    for entry in entries {
        let path = entry.context("cannot list a directory")?.path();
        let removed = if path.is_dir() && !path.is_symlink() {
            fs::remove_dir_all(&path)
        } else {
            fs::remove_file(&path)
        };
        removed.with_context(|| format!("cannot remove {}", path.display()))?;
    }
    Ok(())
}
