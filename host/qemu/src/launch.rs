//! From a [`Launch`] to a process whose monitor answers; and back to one that an earlier agent left.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use driver::{Launch, Process, SERIAL_SOCKET};
use model::VmId;
use model::host::Accelerator;
use qmp::{CommandError, ConnectError, Events, Limits, Session};

use crate::argv::{ArgvError, Descriptors, DiskDescriptors, argv};
use crate::process::{Held, Identity, Pinned, hold, process_of_thread, start};
use crate::program::Program;
use crate::scope::own_scope;

/// The socket within [`Launch::run_dir`] of QEMU's monitor.
pub(crate) const MONITOR_SOCKET: &str = "qmp.sock";
/// The record within [`Launch::run_dir`] of which process it is.
const PROCESS_FILE: &str = "process.json";
/// How long a new QEMU may take to greet; alone it takes 0.1 s.
const GREETING: Duration = Duration::from_secs(30);
/// How long QEMU may take for a command; most take a millisecond.
const COMMAND: Duration = Duration::from_secs(10);
/// How long a QEMU whose monitor closed may take to end.
const ENDING: Duration = Duration::from_secs(2);

/// Why a VM's process could not be started. Nothing is left of it.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    /// The definition cannot be built.
    #[error("the VM's definition cannot be built")]
    Definition(#[from] ArgvError),
    /// This QEMU has no such machine.
    #[error("QEMU {version} here has no machine type {machine:?}; upgrade it, or use a host whose QEMU has it")]
    Machine {
        /// The machine type.
        machine: String,
        /// QEMU's version.
        version: String,
    },
    /// The definition and the files or taps given do not agree.
    #[error("{given} {what} were given for {wanted} in the definition")]
    Count {
        /// Of what.
        what: &'static str,
        /// How many there are.
        given: usize,
        /// How many there should be.
        wanted: usize,
    },
    /// The directory for the sockets cannot be made.
    #[error("cannot prepare {path}")]
    Directory {
        /// The directory, or the socket in it.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The process cannot be made.
    #[error("cannot start {program} as user {uid} (is it installed, and does the agent run as root?)")]
    Start {
        /// The program.
        program: PathBuf,
        /// The user.
        uid: u32,
        /// Why.
        source: io::Error,
    },
    /// It ended at once.
    #[error("{obituary}")]
    Ended {
        /// How, and what it said.
        obituary: String,
    },
    /// Its monitor does not answer.
    #[error("QEMU's monitor does not answer")]
    Monitor(#[source] MonitorError),
}

/// Why a process cannot be taken up again.
#[derive(Debug, thiserror::Error)]
pub enum AdoptError {
    /// There is no such process: it ended, or was never started.
    #[error("its process is gone")]
    Gone,
    /// The process lives, and is not to be driven: the guest in it may run. Try again, or end it by its pidfd.
    #[error("QEMU (pid {pid}) lives, but cannot be driven", pid = process.pid)]
    Deaf {
        /// The process.
        process: Process,
        /// Why.
        source: MonitorError,
    },
    /// The record or the process cannot be read.
    #[error("cannot find out about the process of {path}")]
    Read {
        /// The run directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// Why a monitor does not serve.
#[derive(Debug, thiserror::Error)]
pub enum MonitorError {
    /// No session.
    #[error("no QMP session")]
    Connect(#[from] ConnectError),
    /// A question without an answer.
    #[error("a question without an answer")]
    Ask(#[from] CommandError),
    /// It is another VM's.
    #[error("it is the QEMU of VM {0}")]
    Other(String),
}

/// What a VM's process gets as open descriptors.
#[derive(Debug, Default)]
pub struct Given {
    /// Its network cards' taps, in the order of the definition's ports.
    pub taps: Vec<OwnedFd>,
    /// Its volumes, in the order of the definition.
    pub volumes: Vec<GivenVolume>,
    /// For a direct boot.
    pub boot: Option<GivenKernel>,
    /// The disk that tells the guest who it is, to read; where the layout has one.
    pub seed: Option<OwnedFd>,
}

/// A volume's open files.
#[derive(Debug)]
pub struct GivenVolume {
    /// To read and write, past the host's cache (`O_DIRECT`): another host reads it after a move.
    pub write: OwnedFd,
    /// To read alone, likewise: QEMU opens it so at first.
    pub read: OwnedFd,
    /// The blob it is an overlay of, to read.
    pub base: Option<OwnedFd>,
}

/// A kernel and its initial RAM disk, to read.
#[derive(Debug)]
pub struct GivenKernel {
    /// The kernel.
    pub kernel: OwnedFd,
    /// The initial RAM disk.
    pub initrd: OwnedFd,
}

/// A process and its monitor.
pub(crate) struct Driven {
    pub(crate) held: Held,
    pub(crate) session: Session,
    pub(crate) events: Events,
}

/// Starts the process and waits until its monitor answers.
pub(crate) async fn launch(
    program: &Program,
    sandbox: bool,
    launch: Launch,
    given: Given,
) -> Result<Driven, SpawnError> {
    let run_dir = launch.run_dir.clone();
    let vm = launch.definition.vm;
    let program = program.clone();
    let started = tokio::task::spawn_blocking(move || start_process(&program, sandbox, &launch, given)).await;
    let held = started.map_err(|error| SpawnError::Directory {
        path: run_dir.clone(),
        source: io::Error::other(error),
    })??;
    own_scope(held.pinned.process(), format!("vm-{vm}"));
    match attach(&run_dir, vm, GREETING).await {
        Ok((session, events)) => Ok(Driven { held, session, events }),
        Err(error) => {
            // First this, so that what QEMU says of itself is not lost.
            if wait_end(&held.pinned, ENDING).await {
                let obituary = held.obituary();
                return Err(SpawnError::Ended { obituary });
            }
            end(&held.pinned).await;
            Err(SpawnError::Monitor(error))
        }
    }
}

/// Finds the process of `run_dir` again.
pub(crate) async fn adopt(run_dir: &Path, vm: VmId) -> Result<Driven, AdoptError> {
    let read = |source| AdoptError::Read {
        path: run_dir.to_owned(),
        source,
    };
    let recorded = match std::fs::read(run_dir.join(PROCESS_FILE)) {
        Ok(bytes) => serde_json::from_slice::<Process>(&bytes).ok(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(read(error)),
    };
    let Some(process) = recorded else {
        return adopt_unrecorded(run_dir, vm).await;
    };
    let held = hold(process).map_err(read)?.ok_or(AdoptError::Gone)?;
    match attach(run_dir, vm, COMMAND).await {
        Ok((session, events)) => Ok(Driven { held, session, events }),
        Err(_) if wait_end(&held.pinned, Duration::ZERO).await => Err(AdoptError::Gone),
        Err(source) => Err(AdoptError::Deaf { process, source }),
    }
}

/// The process of `run_dir`, if it lives: whether or not it can be driven.
///
/// # Errors
/// [`AdoptError::Read`] when that cannot be found out.
pub async fn living(run_dir: &Path, vm: VmId) -> Result<Option<Process>, AdoptError> {
    match adopt(run_dir, vm).await {
        Ok(driven) => Ok(Some(driven.held.pinned.process())),
        Err(AdoptError::Deaf { process, .. }) => Ok(Some(process)),
        Err(AdoptError::Gone) => Ok(None),
        Err(error) => Err(error),
    }
}

/// The agent was killed between the start and its record: whoever answers on the socket, by one of its threads, is the process.
async fn adopt_unrecorded(run_dir: &Path, vm: VmId) -> Result<Driven, AdoptError> {
    let read = |source| AdoptError::Read {
        path: run_dir.to_owned(),
        source,
    };
    let (session, events) = match attach(run_dir, vm, GREETING).await {
        Ok(attached) => attached,
        Err(MonitorError::Connect(ConnectError::Socket { .. } | ConnectError::Closed(_))) => {
            return Err(AdoptError::Gone);
        }
        Err(error) => return Err(read(io::Error::other(error))),
    };
    let cpus = session
        .execute(qmp::QueryCpusFast {})
        .await
        .map_err(|error| read(io::Error::other(error)))?;
    let thread = cpus
        .first()
        .ok_or_else(|| read(io::Error::other("a QEMU without CPUs")))?
        .thread_id;
    let process = process_of_thread(thread).map_err(read)?;
    let held = hold(process).map_err(read)?.ok_or(AdoptError::Gone)?;
    record(run_dir, process).map_err(read)?;
    Ok(Driven { held, session, events })
}

/// Connects to the monitor, and checks whose it is.
pub(crate) async fn attach(
    run_dir: &Path,
    vm: VmId,
    greeting_deadline: Duration,
) -> Result<(Session, Events), MonitorError> {
    let limits = Limits {
        greeting_deadline,
        command_deadline: COMMAND,
        ..Limits::default()
    };
    let directory = DirectoryPath::open(run_dir).map_err(|source| ConnectError::Socket {
        path: run_dir.to_owned(),
        source,
    })?;
    let (session, events) = Session::connect(&directory.join(MONITOR_SOCKET), limits).await?;
    let uuid = session.execute(qmp::QueryUuid {}).await?.uuid;
    if uuid != vm.to_string() {
        return Err(MonitorError::Other(uuid));
    }
    Ok((session, events))
}

/// Removes what a VM's process left in its directory, and the directory. Idempotent; only after the process is dead.
///
/// # Errors
/// When something in it cannot be removed.
pub fn clear(run_dir: &Path) -> io::Result<()> {
    match std::fs::remove_dir_all(run_dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Ends a QEMU that did not come up. Its zombie goes when it is dead, however long that takes.
async fn end(process: &Pinned) {
    let killed = process.kill();
    let gone = killed.is_ok() && wait_end(process, ENDING).await;
    tracing::warn!(
        pid = process.process().pid,
        gone,
        "a QEMU that did not come up was ended"
    );
    if gone {
        process.reap();
    } else if let Ok(death) = process.watch() {
        let process = process.clone();
        tokio::spawn(async move {
            if death.readable().await.is_ok() {
                process.reap();
            }
        });
    }
}

/// True when the process is dead within `deadline`.
async fn wait_end(process: &Pinned, deadline: Duration) -> bool {
    let Ok(pidfd) = process.watch() else {
        return false;
    };
    tokio::time::timeout(deadline, pidfd.readable()).await.is_ok()
}

fn start_process(program: &Program, sandbox: bool, launch: &Launch, given: Given) -> Result<Held, SpawnError> {
    let definition = &launch.definition;
    let count = |what, given: usize, wanted: usize| {
        if given == wanted {
            Ok(())
        } else {
            Err(SpawnError::Count { what, given, wanted })
        }
    };
    count("volumes", given.volumes.len(), definition.volumes.len())?;
    count("taps", given.taps.len(), definition.ports.len())?;
    let seeds = usize::from(definition.layout.seed.is_some());
    count("seeds", usize::from(given.seed.is_some()), seeds)?;

    let mut inherited = Inherited::default();
    let mut descriptors = inherit(given, &mut inherited);
    let listen = |inherited: &mut Inherited, name| {
        let listener = run_directory(&launch.run_dir).and_then(|()| listen_in(&launch.run_dir, name));
        let path = launch.run_dir.join(name);
        listener
            .map(|l| inherited.push(l.into()))
            .map_err(|source| SpawnError::Directory { path, source })
    };
    // All that can be refused is refused before anything is made.
    argv(definition, launch.mode, sandbox, &descriptors)?;
    descriptors.monitor = listen(&mut inherited, MONITOR_SOCKET)?;
    descriptors.serial = listen(&mut inherited, SERIAL_SOCKET)?;

    let mut command = program.command();
    command.args(argv(definition, launch.mode, sandbox, &descriptors)?);
    command.current_dir("/").stdin(Stdio::null()).stdout(Stdio::null());
    let identity = Identity {
        uid: launch.uid,
        kvm_group: kvm_group(definition.layout.accelerator),
    };
    let started = start(command, identity, &inherited.0);
    let held = started.map_err(|source| SpawnError::Start {
        program: program.path().to_owned(),
        uid: launch.uid,
        source,
    })?;
    if let Err(source) = record(&launch.run_dir, held.pinned.process()) {
        // Without its record nobody would find it again: it must not stay.
        end_now(&held.pinned);
        return Err(SpawnError::Directory {
            path: launch.run_dir.join(PROCESS_FILE),
            source,
        });
    }
    Ok(held)
}

/// Ends a process that was just started and waits for its end, as long as that may take here.
fn end_now(process: &Pinned) {
    let deadline = rustix::event::Timespec {
        tv_sec: ENDING.as_secs().cast_signed(),
        tv_nsec: 0,
    };
    let mut death = [rustix::event::PollFd::new(process, rustix::event::PollFlags::IN)];
    // A process that may not be ended, or does not die, is left to whoever reads this.
    let ended = process.kill().is_ok() && rustix::event::poll(&mut death, Some(&deadline)).is_ok_and(|ready| ready > 0);
    if !ended {
        tracing::error!(
            pid = process.process().pid,
            "a QEMU without a record was not ended; end it by hand"
        );
    }
    process.reap();
}

/// Gives the child what it was given, by number.
fn inherit(given: Given, inherited: &mut Inherited) -> Descriptors {
    let disks = given.volumes.into_iter().map(|volume| DiskDescriptors {
        volume: [inherited.push(volume.write), inherited.push(volume.read)],
        base: volume.base.map(|base| inherited.push(base)),
    });
    let disks = disks.collect();
    let boot = given.boot;
    Descriptors {
        disks,
        seed: given.seed.map(|seed| inherited.push(seed)),
        boot: boot.map(|boot| (inherited.push(boot.kernel), inherited.push(boot.initrd))),
        taps: given.taps.into_iter().map(|tap| inherited.push(tap)).collect(),
        ..Descriptors::default()
    }
}

/// Descriptors for the child. Each is closed on exec; the child alone undoes that for itself.
#[derive(Default)]
struct Inherited(Vec<OwnedFd>);

impl Inherited {
    fn push(&mut self, fd: OwnedFd) -> RawFd {
        let number = fd.as_raw_fd();
        self.0.push(fd);
        number
    }
}

/// 0700, and ours, not QEMU's: a QEMU that was broken into reaches nothing in it, and gets by descriptor what it needs.
fn run_directory(path: &Path) -> io::Result<()> {
    match DirBuilder::new().mode(0o700).recursive(true).create(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o700))
}

/// A directory by descriptor: socket addresses hold 107 bytes, paths may be longer. What [`Self::join`] gives is good for as long
/// as this lives.
pub(crate) struct DirectoryPath(File);

impl DirectoryPath {
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let options = libc::O_PATH | libc::O_DIRECTORY;
        OpenOptions::new().read(true).custom_flags(options).open(path).map(Self)
    }

    pub(crate) fn join(&self, name: &str) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}/{name}", self.0.as_raw_fd()))
    }
}

/// Listens on `name` in `directory`, 0600, in place of what an earlier process left there.
pub(crate) fn listen_in(directory: &Path, name: &str) -> io::Result<UnixListener> {
    match std::fs::remove_file(directory.join(name)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(DirectoryPath::open(directory)?.join(name))?;
    std::fs::set_permissions(directory.join(name), std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

fn record(run_dir: &Path, process: Process) -> io::Result<()> {
    let (new, path) = (run_dir.join("process.new"), run_dir.join(PROCESS_FILE));
    std::fs::write(&new, serde_json::to_vec(&process)?)?;
    std::fs::rename(new, path)
}

/// A QEMU of its own user opens `/dev/kvm` by its group.
fn kvm_group(accelerator: Accelerator) -> Option<u32> {
    match accelerator {
        Accelerator::Kvm => std::fs::metadata("/dev/kvm").ok().map(|device| device.gid()),
        Accelerator::Tcg => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A process that goes on for longer than any test, as our child.
    fn lasting() -> Pinned {
        let child = std::process::Command::new("sleep").arg("1000").spawn();
        Pinned::child(child.expect("coreutils are there")).expect("it is held")
    }

    fn is_there(process: &Pinned) -> bool {
        // A zombie is there too.
        Path::new(&format!("/proc/{}", process.process().pid)).exists()
    }

    #[tokio::test]
    async fn a_qemu_that_does_not_come_up_leaves_no_zombie() {
        let process = lasting();
        end(&process).await;
        assert!(!is_there(&process));
        assert!(Pinned::find(process.process()).expect("the kernel tells").is_none());
        let process = lasting();
        end_now(&process);
        assert!(!is_there(&process));
    }
}
