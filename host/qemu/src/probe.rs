//! Which accelerator to use, found out by running guest instructions under each.
//!
//! `/dev/kvm` may be there and open, and yet guests crawl or hang: nested, or on kernels that emulate what the CPU does not
//! virtualise. Seen on one of those: the firmware takes 3 s instead of 0.1 s, 64-bit code some 4 us an instruction, and a
//! distribution's kernel never prints a line.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::process::{ExitStatus, Stdio};
use std::time::{Duration, Instant};

use model::host::Accelerator;
use rustix::fs::MemfdFlags;
use rustix::io::{Errno, FdFlags};
use rustix::process::Signal;
use tokio::io::AsyncReadExt;
use tokio::process::Command;

use crate::probe_guest;
use crate::program::Program;

/// Emulated, the guest takes half a second on a machine of its own.
const EMULATED_DEADLINE: Duration = Duration::from_secs(30);
/// What KVM may take beyond emulation before it is cut off: enough to say by how much it is slower.
const KVM_GRACE: Duration = Duration::from_secs(1);
const STDERR_BYTES_MAX: u64 = 4096;
const EXCERPT_CHARS: usize = 200;

/// What the probe chose.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    /// The accelerator to use.
    pub accelerator: Accelerator,
    /// Why, for people.
    pub reason: String,
}

/// One run of the probe's guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Trial {
    /// It finished, with the right result.
    Right {
        /// From the start of QEMU to its end.
        took: Duration,
    },
    /// It finished, with a wrong result: what the CPU computes cannot be trusted.
    Wrong,
    /// It did not finish in time.
    Unfinished {
        /// When it was cut off.
        after: Duration,
    },
    /// QEMU failed.
    Failed {
        /// What it said.
        detail: String,
    },
}

/// Neither accelerator runs a guest.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// The guest's disk cannot be made.
    #[error("no memory for the probe's disk")]
    Disk(#[source] io::Error),
    /// Both fail.
    #[error("this QEMU runs no guest here: emulated: {emulated}; kvm: {kvm}")]
    Neither {
        /// What emulation did.
        emulated: String,
        /// What KVM did.
        kvm: String,
    },
}

/// Opens KVM's device, as an accelerator would.
///
/// # Errors
/// When it does not open.
pub fn open_kvm() -> io::Result<File> {
    OpenOptions::new().read(true).write(true).open("/dev/kvm")
}

/// Runs the probe's guest emulated and, if `/dev/kvm` opens, under KVM; takes one to two seconds.
///
/// KVM is chosen only when its guest computes rightly and is not slower. Nothing is left of it, also when the caller is killed: the
/// disk is memory, and QEMU ends with the thread that calls.
///
/// # Errors
/// When neither runs the guest.
pub async fn probe(program: &Program) -> Result<Verdict, ProbeError> {
    let disk = disk().map_err(ProbeError::Disk)?;
    let emulated = run(program, Accelerator::Tcg, &disk, EMULATED_DEADLINE).await;
    let kvm = match open_kvm() {
        Err(error) => Err(error),
        Ok(_) => {
            let deadline = match emulated {
                Trial::Right { took } => took + KVM_GRACE,
                _ => EMULATED_DEADLINE,
            };
            Ok(run(program, Accelerator::Kvm, &disk, deadline).await)
        }
    };
    judge(&emulated, kvm)
}

/// The choice, from what was seen. `kvm` is the failure to open `/dev/kvm`, or the trial.
fn judge(emulated: &Trial, kvm: io::Result<Trial>) -> Result<Verdict, ProbeError> {
    let under_kvm = match &kvm {
        Err(error) => not_opened(error),
        Ok(trial) => format!("opened, but the probe guest {trial}"),
    };
    let (accelerator, reason) = match (emulated, &kvm) {
        (Trial::Right { took: slow }, Ok(Trial::Right { took })) if took <= slow => (
            Accelerator::Kvm,
            format!(
                "kvm: the probe guest took {} against {} emulated",
                seconds(*took),
                seconds(*slow)
            ),
        ),
        (Trial::Right { took: fast }, Ok(Trial::Right { .. } | Trial::Unfinished { .. })) => (
            Accelerator::Tcg,
            format!("kvm: {under_kvm} against {} emulated; using tcg", seconds(*fast)),
        ),
        (Trial::Right { .. }, _) => (Accelerator::Tcg, format!("kvm: {under_kvm}; using tcg")),
        (failed, Ok(Trial::Right { took })) => (
            Accelerator::Kvm,
            format!("kvm: the probe guest took {}; emulated, it {failed}", seconds(*took)),
        ),
        (failed, _) => {
            return Err(ProbeError::Neither {
                emulated: failed.to_string(),
                kvm: under_kvm,
            });
        }
    };
    Ok(Verdict { accelerator, reason })
}

fn not_opened(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::NotFound => {
            "no /dev/kvm (virtualisation is off in the firmware, or the kvm module is not loaded)".to_owned()
        }
        io::ErrorKind::PermissionDenied => {
            "no permission to open /dev/kvm (add the agent's user to group kvm)".to_owned()
        }
        _ => format!("/dev/kvm does not open ({error})"),
    }
}

impl std::fmt::Display for Trial {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Right { took } => write!(f, "took {}", seconds(*took)),
            Self::Wrong => f.write_str("computed wrongly"),
            Self::Unfinished { after } => write!(f, "had not finished after {}", seconds(*after)),
            Self::Failed { detail } => write!(f, "failed: {detail}"),
        }
    }
}

fn seconds(duration: Duration) -> String {
    format!("{:.1} s", duration.as_secs_f64())
}

async fn run(program: &Program, accelerator: Accelerator, image: &OwnedFd, deadline: Duration) -> Trial {
    let mut command = program.command();
    let path = format!("/proc/self/fd/{}", image.as_raw_fd());
    let disk = serde_json::json!({"driver": "file", "filename": path, "node-name": "disk"});
    // What a VM has, too: its machine, its CPU model, a virtio disk.
    let cpu = if accelerator == Accelerator::Kvm {
        "Nehalem"
    } else {
        "qemu64"
    };
    command.args([
        "-machine",
        "q35",
        "-cpu",
        cpu,
        "-accel",
        &accelerator.to_string(),
        "-m",
        "64",
    ]);
    command.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
    command.args(["-blockdev", &disk.to_string(), "-device", "virtio-blk-pci,drive=disk"]);
    command.args(["-device", "isa-debug-exit,iobase=0xf4,iosize=4"]);
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    end_with_caller(&mut command, image.as_raw_fd());
    let started = Instant::now();
    let finished = tokio::time::timeout(deadline, finish(Command::from(command))).await;
    let took = started.elapsed();
    match finished {
        Err(_) => Trial::Unfinished { after: took },
        Ok(Err(error)) => Trial::Failed {
            detail: format!("QEMU did not start: {error}"),
        },
        Ok(Ok((status, _))) if status.code() == Some(probe_guest::EXIT_RIGHT) => Trial::Right { took },
        Ok(Ok((status, _))) if status.code() == Some(probe_guest::EXIT_WRONG) => Trial::Wrong,
        Ok(Ok((status, said))) => {
            let said: String = said
                .lines()
                .last()
                .unwrap_or_default()
                .chars()
                .take(EXCERPT_CHARS)
                .collect();
            Trial::Failed {
                detail: format!("QEMU ended ({status}): {said}"),
            }
        }
    }
}

/// Runs to the end; killed when dropped.
async fn finish(mut command: Command) -> io::Result<(ExitStatus, String)> {
    let mut child = command.kill_on_drop(true).spawn()?;
    let mut said = Vec::new();
    if let Some(stderr) = child.stderr.take() {
        stderr.take(STDERR_BYTES_MAX).read_to_end(&mut said).await?;
    }
    Ok((child.wait().await?, String::from_utf8_lossy(&said).trim().to_owned()))
}

/// The guest's disk: a file without a name.
fn disk() -> io::Result<OwnedFd> {
    let mut disk = File::from(rustix::fs::memfd_create("probe", MemfdFlags::CLOEXEC)?);
    disk.write_all(&probe_guest::disk())?;
    Ok(disk.into())
}

/// Lets the child end when the thread that starts it does, and gives it the disk.
///
/// Without it a QEMU whose guest hangs would outlive an agent that is killed meanwhile, which is just what the deadline is against.
#[allow(unsafe_code)]
fn end_with_caller(command: &mut std::process::Command, disk: RawFd) {
    let caller = rustix::process::getpid();
    let prepare = move || {
        rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
        // It may have died before the line above: then no signal comes any more.
        if rustix::process::getppid() != Some(caller) {
            return Err(io::Error::from(Errno::SRCH));
        }
        // SAFETY: the number is of a descriptor that `run` borrows until the child has been made.
        let disk = unsafe { std::os::fd::BorrowedFd::borrow_raw(disk) };
        rustix::io::fcntl_setfd(disk, FdFlags::empty())?;
        Ok(())
    };
    // SAFETY: the closure makes plain system calls; it neither allocates nor takes a lock.
    unsafe { std::os::unix::process::CommandExt::pre_exec(command, prepare) };
}

#[cfg(test)]
mod tests {
    use super::*;

    fn right(ms: u64) -> Trial {
        Trial::Right {
            took: Duration::from_millis(ms),
        }
    }

    fn chosen(emulated: &Trial, kvm: io::Result<Trial>) -> (Accelerator, String) {
        let verdict = judge(emulated, kvm).unwrap();
        (verdict.accelerator, verdict.reason)
    }

    #[test]
    fn kvm_is_chosen_only_when_it_is_right_and_not_slower() {
        assert_eq!(
            chosen(&right(500), Ok(right(200))),
            (
                Accelerator::Kvm,
                "kvm: the probe guest took 0.2 s against 0.5 s emulated".into()
            )
        );
        assert_eq!(
            chosen(&right(300), Ok(right(4100))),
            (
                Accelerator::Tcg,
                "kvm: opened, but the probe guest took 4.1 s against 0.3 s emulated; using tcg".into()
            )
        );
        let hangs = Trial::Unfinished {
            after: Duration::from_millis(1500),
        };
        assert_eq!(
            chosen(&right(500), Ok(hangs)).1,
            "kvm: opened, but the probe guest had not finished after 1.5 s against 0.5 s emulated; using tcg"
        );
        assert_eq!(chosen(&right(500), Ok(Trial::Wrong)).0, Accelerator::Tcg);
        let aborted = Trial::Failed {
            detail: "QEMU ended (signal: 6)".into(),
        };
        assert_eq!(
            chosen(&right(500), Ok(aborted.clone())).1,
            "kvm: opened, but the probe guest failed: QEMU ended (signal: 6); using tcg"
        );
        assert_eq!(
            chosen(&aborted, Ok(right(200))).0,
            Accelerator::Kvm,
            "a QEMU built without emulation"
        );
    }

    #[test]
    fn a_kvm_that_does_not_open_is_told_with_its_remedy() {
        for (kind, words) in [
            (io::ErrorKind::NotFound, "module is not loaded"),
            (io::ErrorKind::PermissionDenied, "group kvm"),
        ] {
            let (accelerator, reason) = chosen(&right(500), Err(kind.into()));
            assert_eq!(accelerator, Accelerator::Tcg);
            assert!(reason.contains(words) && reason.ends_with("; using tcg"), "{reason}");
        }
    }

    /// What the next test runs as a process, to kill it in the middle of a probe; by itself it does nothing.
    #[tokio::test]
    async fn a_caller_with_a_guest_that_hangs() {
        let Ok(program) = std::env::var("GODWIT_TEST_PROGRAM") else {
            return;
        };
        run(
            &Program::at(program),
            Accelerator::Tcg,
            &disk().unwrap(),
            EMULATED_DEADLINE,
        )
        .await;
    }

    /// What can be read within a generous time: nothing at all is the end of the other side.
    fn read_in_time(pipe: &mut File) -> String {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        use std::io::Read as _;
        let within = Timespec { tv_sec: 60, tv_nsec: 0 };
        let ready = poll(&mut [PollFd::new(pipe, PollFlags::IN)], Some(&within)).unwrap();
        assert_eq!(ready, 1, "neither a word nor its end within a minute");
        let mut word = [0; 32];
        let count = pipe.read(&mut word).unwrap();
        String::from_utf8_lossy(&word[..count]).trim().to_owned()
    }

    #[test]
    fn a_probe_ends_with_its_caller_however_that_ends() {
        use std::os::unix::fs::OpenOptionsExt as _;
        let directory = tempfile::tempdir().unwrap();
        let (program, held) = (directory.path().join("qemu"), directory.path().join("held"));
        let own = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
        rustix::fs::mknodat(rustix::fs::CWD, &held, rustix::fs::FileType::Fifo, own, 0).unwrap();
        let nonblock = libc::O_NONBLOCK;
        let mut pipe = OpenOptions::new()
            .read(true)
            .custom_flags(nonblock)
            .open(&held)
            .unwrap();
        // A program that stands for ever, and holds the pipe open as long as it is there.
        let text = format!("#!/bin/sh\nexec 9>{}\necho $$ >&9\nkill -STOP $$\n", held.display());
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o755)
            .open(&program)
            .unwrap();
        file.write_all(text.as_bytes()).unwrap();
        drop(file);
        let mut caller = std::process::Command::new(std::env::current_exe().unwrap());
        caller.args(["--exact", "probe::tests::a_caller_with_a_guest_that_hangs"]);
        let caller = caller.env("GODWIT_TEST_PROGRAM", &program).stdout(Stdio::null());
        let mut caller = caller.spawn().unwrap();
        let pid = read_in_time(&mut pipe);
        caller.kill().unwrap();
        caller.wait().unwrap();
        let ended = std::panic::catch_unwind(move || read_in_time(&mut pipe));
        if ended.is_err() {
            let left = rustix::process::Pid::from_raw(pid.parse().unwrap()).unwrap();
            rustix::process::kill_process(left, Signal::KILL).unwrap();
        }
        assert_eq!(ended.unwrap(), "", "process {pid} outlived its caller");
    }

    #[test]
    fn no_accelerator_at_all_is_an_error_that_tells_both() {
        let error = judge(&Trial::Wrong, Err(io::ErrorKind::NotFound.into()))
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("computed wrongly") && error.contains("/dev/kvm"),
            "{error}"
        );
    }
}
