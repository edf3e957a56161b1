//! Processes as the host sees them: held by more than a pid, found again, ended; and a QEMU's, started to outlive the agent, with its
//! last words.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};
use std::sync::Arc;

use driver::Process;
use rustix::fs::{MemfdFlags, SealFlags};
use rustix::io::{Errno, FdFlags};
use rustix::process::{Pid, PidfdFlags, Resource, Rlimit, Signal, WaitId, WaitIdOptions, WaitIdStatus};
use rustix::thread::{set_no_new_privs, set_thread_groups, set_thread_res_gid, set_thread_res_uid};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// How much of a QEMU's messages is kept: the first ones tell what is wrong.
const MESSAGES_BYTES: usize = 64 * 1024;
/// How much of them a report quotes: the last ones.
const QUOTED_BYTES: usize = 1000;

/// Who a process becomes.
#[derive(Debug, Clone)]
pub(crate) struct Identity {
    pub(crate) uid: u32,
    /// The group that may open `/dev/kvm`, where that is needed.
    pub(crate) kvm_group: Option<u32>,
}

/// A process held so that its pid cannot come to mean another. Dropping this does not end it.
#[derive(Debug, Clone)]
pub struct Pinned {
    process: Process,
    pidfd: Arc<OwnedFd>,
}

/// A QEMU's process.
#[derive(Debug)]
pub(crate) struct Held {
    pub(crate) pinned: Pinned,
    messages: Option<File>,
    /// Where in them what concerns the present begins.
    present: usize,
}

/// Starts `command` as `identity`, in a session of its own, with `inherited` descriptors under their own numbers.
pub(crate) fn start(mut command: Command, identity: Identity, inherited: &[OwnedFd]) -> io::Result<Held> {
    let messages = message_file()?;
    command.stderr(messages.try_clone()?);
    let numbers: Vec<RawFd> = inherited.iter().map(AsRawFd::as_raw_fd).collect();
    become_apart(&mut command, identity, numbers);
    Ok(Held {
        pinned: Pinned::child(command.spawn()?)?,
        messages: Some(messages),
        present: 0,
    })
}

/// Between fork and exec: own session, no core file (it would hold the guest's memory), own user, no way to more privileges.
#[allow(unsafe_code)]
fn become_apart(command: &mut Command, identity: Identity, inherited: Vec<RawFd>) {
    let change = rustix::process::geteuid().is_root() && identity.uid != 0;
    let groups: Vec<rustix::fs::Gid> = identity.kvm_group.into_iter().map(rustix::fs::Gid::from_raw).collect();
    let uid = rustix::fs::Uid::from_raw(identity.uid);
    let gid = rustix::fs::Gid::from_raw(identity.uid);
    let prepare = move || {
        rustix::process::setsid()?;
        rustix::process::setrlimit(
            Resource::Core,
            Rlimit {
                current: Some(0),
                maximum: Some(0),
            },
        )?;
        if change {
            set_thread_groups(&groups)?;
            set_thread_res_gid(gid, gid, gid)?;
            // From root to another: the kernel drops all capabilities with it.
            set_thread_res_uid(uid, uid, uid)?;
        }
        set_no_new_privs(true)?;
        for fd in &inherited {
            // SAFETY: the number is of an `OwnedFd` that `start` borrows until the child has been made.
            let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(*fd) };
            rustix::io::fcntl_setfd(fd, FdFlags::empty())?;
        }
        Ok(())
    };
    // SAFETY: the closure makes plain system calls; it neither allocates nor takes a lock.
    unsafe { command.pre_exec(prepare) };
}

/// Bounded by the kernel, and there as long as the process or an agent holds it: a guest that makes QEMU complain again and
/// again fills no disk, and a restarted agent still reads it.
fn message_file() -> io::Result<File> {
    let memory = rustix::fs::memfd_create("messages", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    rustix::fs::ftruncate(&memory, MESSAGES_BYTES as u64)?;
    rustix::fs::fcntl_add_seals(&memory, SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL)?;
    Ok(memory.into())
}

/// Takes hold of a QEMU of an earlier agent; `None` when it is gone, or its pid is another's by now.
pub(crate) fn hold(process: Process) -> io::Result<Option<Held>> {
    let found = Pinned::find(process)?;
    Ok(found.map(|pinned| {
        let mut held = Held {
            pinned,
            messages: File::open(format!("/proc/{}/fd/2", process.pid)).ok(),
            present: 0,
        };
        held.turn_page();
        held
    }))
}

/// The process that a thread belongs to.
pub(crate) fn process_of_thread(thread: i32) -> io::Result<Process> {
    let status = std::fs::read_to_string(format!("/proc/{thread}/status"))?;
    let pid = status
        .lines()
        .find_map(|line| line.strip_prefix("Tgid:")?.trim().parse().ok());
    let pid = pid.ok_or_else(|| io::Error::other("no Tgid in /proc/PID/status"))?;
    Ok(Process {
        pid,
        start_ticks: start_ticks(pid)?,
    })
}

impl Pinned {
    /// Takes hold of a child that nobody has waited for.
    ///
    /// # Errors
    /// When the kernel refuses; the child is ended then.
    pub fn child(mut child: Child) -> io::Result<Self> {
        let pid = child.id();
        // Not waited for yet, so the pid cannot be another's.
        let held = || {
            let pidfd = Arc::new(rustix::process::pidfd_open(as_pid(pid)?, PidfdFlags::NONBLOCK)?);
            let process = Process {
                pid,
                start_ticks: start_ticks(pid)?,
            };
            Ok(Self { process, pidfd })
        };
        held().inspect_err(|_| {
            // Nobody would find it again. It may have ended by itself.
            let _ = child.kill();
            let _ = child.wait();
        })
    }

    /// Takes hold of a process by what was recorded of it; `None` when it is gone, or its pid is another's by now.
    ///
    /// # Errors
    /// When the kernel does not tell.
    pub fn find(process: Process) -> io::Result<Option<Self>> {
        let pidfd = match rustix::process::pidfd_open(as_pid(process.pid)?, PidfdFlags::NONBLOCK) {
            Err(Errno::SRCH | Errno::INVAL) => return Ok(None),
            pidfd => Arc::new(pidfd?),
        };
        // Read after the pidfd was taken: if it matches now, the pidfd is of the right process.
        match start_ticks(process.pid) {
            Ok(ticks) if ticks == process.start_ticks => Ok(Some(Self { process, pidfd })),
            Ok(_) => Ok(None),
            Err(error) if error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH) => {
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// Which process it is.
    #[must_use]
    pub fn process(&self) -> Process {
        self.process
    }

    /// Ends it at once; nothing when it is dead.
    ///
    /// # Errors
    /// When that is not permitted.
    pub fn kill(&self) -> io::Result<()> {
        match rustix::process::pidfd_send_signal(&self.pidfd, Signal::KILL) {
            Ok(()) | Err(Errno::SRCH) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Becomes readable when the process is dead.
    ///
    /// # Errors
    /// When the runtime cannot watch it.
    #[allow(unsafe_code)]
    pub fn watch(&self) -> io::Result<AsyncFd<Arc<OwnedFd>>> {
        // SAFETY: the descriptor is owned, and neither replaced nor closed while the watch holds its share of it.
        Ok(unsafe { AsyncFd::register_with_interest(Arc::clone(&self.pidfd), Interest::READABLE)? })
    }

    /// Takes its zombie away, once it is dead, where it is our child; how it ended then. That of another is not ours to wait for.
    pub fn reap(&self) -> Option<WaitIdStatus> {
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
        rustix::process::waitid(WaitId::PidFd(self.pidfd.as_fd()), options)
            .ok()
            .flatten()
    }
}

impl AsFd for Pinned {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

impl Held {
    /// How it ended and what it said, for people. Takes the zombie away where it is our child.
    pub(crate) fn obituary(&self) -> String {
        let how = match self.pinned.reap() {
            Some(status) => match (status.exit_status(), status.terminating_signal()) {
                (Some(code), _) => format!("QEMU ended with status {code}"),
                (_, Some(signal)) => format!("QEMU was killed by signal {signal}"),
                _ => "QEMU ended".to_owned(),
            },
            // Another agent's child: nobody here is told.
            None => "QEMU ended".to_owned(),
        };
        match (self.last_words(), how.ends_with("signal 9")) {
            // Who is killed says nothing about it.
            (_, true) => how,
            (words, _) if words.is_empty() && how == "QEMU ended" => {
                format!("{how} without a word, as when it is killed or there is no memory left")
            }
            (words, _) if words.is_empty() => how,
            (words, _) => format!("{how}: {words}"),
        }
    }

    /// What was said by now is of the past: it explains no later end.
    pub(crate) fn turn_page(&mut self) {
        self.present = self.said().len();
    }

    fn said(&self) -> Vec<u8> {
        let mut said = vec![0; MESSAGES_BYTES];
        let count = self.messages.as_ref().and_then(|file| file.read_at(&mut said, 0).ok());
        let count = count.unwrap_or(0);
        let end = said[..count].iter().position(|byte| *byte == 0).unwrap_or(count);
        said.truncate(end);
        said
    }

    fn last_words(&self) -> String {
        let said = self.said();
        let quoted = said.get(self.present..).unwrap_or_default();
        let quoted = &quoted[quoted.len().saturating_sub(QUOTED_BYTES)..];
        in_one_line(&String::from_utf8_lossy(quoted))
    }
}

/// QEMU's messages without the time and name that it puts before each, in one line.
fn in_one_line(said: &str) -> String {
    let lines = said.lines().map(|line| match line.split_once(": ") {
        Some((before, message)) if before.contains("qemu-system-") => message.trim(),
        _ => line.trim(),
    });
    lines.filter(|line| !line.is_empty()).collect::<Vec<_>>().join("; ")
}

/// Field 22 of `/proc/PID/stat`; the second field may hold spaces and parentheses.
fn start_ticks(pid: u32) -> io::Result<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let after_name = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    after_name
        .split_whitespace()
        .nth(19)
        .and_then(|field| field.parse().ok())
        .ok_or_else(|| io::Error::other(format!("/proc/{pid}/stat has no start time")))
}

fn as_pid(pid: u32) -> io::Result<Pid> {
    i32::try_from(pid)
        .ok()
        .and_then(Pid::from_raw)
        .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    fn held(program: &str, arguments: &[&str]) -> (Held, File) {
        let messages = message_file().unwrap();
        let mut command = Command::new(program);
        command.args(arguments).stderr(messages.try_clone().unwrap());
        let pinned = Pinned::child(command.spawn().unwrap()).unwrap();
        let kept = messages.try_clone().unwrap();
        let held = Held {
            pinned,
            messages: Some(messages),
            present: 0,
        };
        (held, kept)
    }

    fn ended(held: &Held) {
        let pidfd = held.pinned.as_fd();
        let mut slots = [rustix::event::PollFd::from_borrowed_fd(
            pidfd,
            rustix::event::PollFlags::IN,
        )];
        rustix::event::poll(&mut slots, None).unwrap();
    }

    #[test]
    fn the_end_of_a_process_is_told_in_one_line_with_its_present_words_only() {
        let (mut killed, mut said) = held("sleep", &["100"]);
        said.write_all(b"2026-11-20T20:12:16.1Z qemu-system-x86_64: of the last move\n")
            .unwrap();
        killed.pinned.kill().unwrap();
        ended(&killed);
        assert_eq!(killed.obituary(), "QEMU was killed by signal 9");
        killed.turn_page();
        // As after the agent that was its parent: nobody is told how it ended.
        assert!(killed.obituary().contains("without a word"), "{}", killed.obituary());

        let (mut failed, mut said) = held("sh", &["-c", "exit 1"]);
        ended(&failed);
        said.write_all(b"old\n").unwrap();
        failed.turn_page();
        said.write_all(b"2026-11-20T20:12:28.9Z qemu-system-x86_64: no disk\nqemu-system-x86_64: warning: x\n")
            .unwrap();
        assert_eq!(failed.obituary(), "QEMU ended with status 1: no disk; warning: x");
    }
}
