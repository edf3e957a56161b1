//! A pool of hosts on one machine: namespaces, wires, processes, and their end.

mod host;
pub mod net;
mod procs;
mod remove;
mod spawn;

pub use host::Host;
pub use net::Nets;
pub use procs::kill_process;
pub use remove::{end_is_expected, ending, sweep};
pub use spawn::Proc;

use anyhow::{Context, Result, bail};
use rustix::fs::{FlockOperation, flock};
use std::ffi::OsString;
use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Where labs live. On a disk, not under /run: a store that is measured on
/// tmpfs would lie about its fsync.
const ROOT: &str = "/var/tmp/godwit-lab";

/// What a lab is made of.
#[derive(Clone, Debug)]
pub struct LabConfig {
    /// Number of hosts, 1 to 40; they are called h1, h2 ...
    pub hosts: u8,
    /// Unique id, 1 to 8 letters or digits; none: from the process id.
    pub id: Option<String>,
    /// Programs made visible in every host under `/run/godwit-bin/NAME`,
    /// wherever they are on this machine.
    pub programs: Vec<(String, PathBuf)>,
    /// Further directories and files private to each host, as libvirt's, begun as copies of this
    /// machine's; those that do not exist here must be below /run, /srv or
    /// /var/{lib,cache,log}, which every host has for itself.
    pub private: Vec<PathBuf>,
}

/// Where a process of the lab runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// This machine's own namespaces, with an address on both of the lab's networks.
    Root,
    /// Host number N, from 1.
    Host(u8),
    /// The client on the guests' network.
    Client,
}

/// A running lab. Dropping it kills its processes and removes all traces.
#[derive(Debug)]
pub struct Lab {
    id: String,
    dir: PathBuf,
    nets: Nets,
    hosts: Vec<Host>,
    /// Held for the lab's life: a lab whose lock is free is stale.
    _lock: File,
}

impl Lab {
    /// Removes stale labs and builds a new one.
    ///
    /// # Errors
    /// Without root, without `ip`, `nsenter` and `unshare`, or when the kernel
    /// refuses a namespace or a bridge; what was made is removed.
    pub fn new(config: &LabConfig) -> Result<Lab> {
        if !rustix::process::geteuid().is_root() {
            bail!("a lab makes network and mount namespaces, which needs root: start it with sudo");
        }
        if config.hosts == 0 || config.hosts > 40 {
            bail!("a lab has 1 to 40 hosts, not {}", config.hosts);
        }
        sweep()?;
        // One at a time, so that two labs do not choose the same subnets.
        let _turn = turn()?;
        let id = match &config.id {
            Some(id) => id.clone(),
            None => base36(std::process::id()),
        };
        let dir = Path::new(ROOT).join(&id);
        fs::create_dir(&dir)
            .with_context(|| format!("cannot make {}: is a lab called `{id}` already running?", dir.display()))?;
        let lock = lock(&dir.join("lock"), false)?;
        let nets = Nets::free()?;
        let mut lab = Lab {
            id,
            dir,
            nets,
            hosts: Vec::new(),
            _lock: lock,
        };
        // From here on Drop removes what was made.
        remove::on_signals(lab.dir.clone())?;
        for dir in ["logs", "shared"] {
            fs::create_dir(lab.dir.join(dir)).context("cannot make the lab's directories")?;
        }
        net::build(&lab.id, nets, config.hosts)?;
        for n in 1..=config.hosts {
            lab.hosts.push(Host::new(&lab, n, config)?);
        }
        Ok(lab)
    }

    /// The lab's id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The lab's directory on this machine; hosts do not see it.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Where the output of the lab's processes goes, one file each.
    pub fn logs(&self) -> PathBuf {
        self.dir.join("logs")
    }

    /// Copies the logs, those of hosts' VMs and tunnels too, to a directory that outlives the lab; none when that fails,
    /// because this is for telling why something else failed.
    pub fn keep_logs(&self) -> Option<PathBuf> {
        let named = |n: u32| std::env::temp_dir().join(format!("godwit-lab-logs-{}-{n}", self.id));
        let kept = (1..100).map(named).find(|dir| fs::create_dir(dir).is_ok())?;
        for entry in fs::read_dir(self.logs()).ok()?.flatten() {
            fs::copy(entry.path(), kept.join(entry.file_name())).ok()?;
        }
        for host in &self.hosts {
            for part in ["state/logs", "run"] {
                keep(&host.dir().join(part), &kept.join(host.name()).join(part));
            }
        }
        Some(kept)
    }

    /// The shared pool as seen from this machine.
    pub fn shared(&self) -> PathBuf {
        self.dir.join("shared")
    }

    /// Its two subnets.
    pub fn nets(&self) -> Nets {
        self.nets
    }

    /// The hosts, h1 first.
    pub fn hosts(&self) -> &[Host] {
        &self.hosts
    }

    /// Host number `n`, from 1.
    ///
    /// # Errors
    /// When the lab has no such host.
    pub fn host(&self, n: u8) -> Result<&Host> {
        n.checked_sub(1)
            .and_then(|index| self.hosts.get(usize::from(index)))
            .with_context(|| format!("the lab has no host h{n}"))
    }

    /// Path of the client's network namespace, for [`crate::probe`] and [`crate::load`].
    pub fn client_netns(&self) -> PathBuf {
        Path::new("/run/netns").join(net::netns(&self.id, "cl"))
    }

    /// Starts `argv` at `place`; its output goes to `logs/NAME.log`.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn spawn<S: Into<OsString> + Clone>(&self, place: Place, name: &str, argv: &[S]) -> Result<Proc> {
        let words = self.enter(place)?;
        let own = argv.iter().cloned().map(Into::into);
        Proc::start(words.into_iter().chain(own).collect(), name, &self.dir)
    }

    /// Runs `argv` at `place` to its end and returns its standard output.
    ///
    /// # Errors
    /// As [`crate::run::run`].
    pub fn run<S: Into<OsString> + Clone>(&self, place: Place, argv: &[S]) -> Result<String> {
        let mut words = self.enter(place)?;
        words.extend(argv.iter().cloned().map(Into::into));
        crate::run::run(&words)
    }

    /// The words that put a command at `place`.
    fn enter(&self, place: Place) -> Result<Vec<OsString>> {
        Ok(match place {
            Place::Root => Vec::new(),
            Place::Host(n) => self.host(n)?.enter(),
            Place::Client => {
                let mut net = OsString::from("--net=");
                net.push(self.client_netns());
                vec!["nsenter".into(), net, "--".into()]
            }
        })
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if let Err(error) = remove::remove(&self.dir) {
            eprintln!("the lab {} could not be removed: {error:#}", self.dir.display());
        }
        for host in &mut self.hosts {
            host.reap();
        }
    }
}

/// Copies what is called `*.log` below a directory; what cannot be read, or vanishes meanwhile, is left out.
fn keep(from: &Path, to: &Path) {
    for entry in fs::read_dir(from).into_iter().flatten().flatten() {
        let (path, place) = (entry.path(), to.join(entry.file_name()));
        if path.is_dir() && !path.is_symlink() {
            keep(&path, &place);
        } else if path.extension().is_some_and(|extension| extension == "log") {
            let _ = fs::create_dir_all(to).and_then(|()| fs::copy(&path, &place));
        }
    }
}

/// The right to make or judge labs, one at a time. The last lab's end removes
/// the file, so a lock on a file that is gone counts for nothing.
fn turn() -> Result<File> {
    loop {
        fs::create_dir_all(ROOT).with_context(|| format!("cannot make {ROOT}"))?;
        let file = lock(&Path::new(ROOT).join("turn"), true)?;
        if file.metadata().context("cannot look at the labs' lock")?.nlink() > 0 {
            return Ok(file);
        }
    }
}

/// Opens and locks a file; waits for it, or fails at once when it is held.
fn lock(path: &Path, wait: bool) -> Result<File> {
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path)
        .with_context(|| format!("cannot open {}", path.display()))?;
    let operation = if wait {
        FlockOperation::LockExclusive
    } else {
        FlockOperation::NonBlockingLockExclusive
    };
    flock(&file, operation).with_context(|| format!("cannot lock {}", path.display()))?;
    Ok(file)
}

/// Process ids reach 4,194,304: five digits at most.
fn base36(mut number: u32) -> String {
    let mut digits = Vec::new();
    loop {
        digits.extend(char::from_digit(number % 36, 36));
        number /= 36;
        if number == 0 {
            return digits.iter().rev().collect();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_process_id_makes_an_interface_name_that_fits() {
        let name = format!("gw{}-u", base36(4_194_304));
        assert!(name.len() <= 15, "{name}");
        assert_ne!(base36(1000), base36(1001));
    }
}
