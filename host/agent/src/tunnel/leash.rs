//! The leash of a source's tunnel: its agent says whether QEMU's stream may flow, and a stream that nobody holds stands.
//!
//! QEMU ends a copy by itself as soon as little is left, and then its guest stands. Without an agent that tells the other host so, it
//! would stand until one is back. What QEMU cannot send it cannot end: see docs/adr/0051-a-copy-on-a-leash.md.

use std::io::{self, Read as _};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd};

use super::TunnelError;

/// What an agent says on the leash, a byte each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Word {
    /// The stream stands.
    Hold = b'h',
    /// It flows while this connection is there.
    Flow = b'f',
    /// It flows to its end, whoever is there.
    Free = b'r',
}

/// Whether bytes are taken from QEMU.
pub(super) struct Gate {
    open: AtomicBool,
    /// Readable while it is open, so that any number of threads can wait for it.
    sign: OwnedFd,
}

impl Gate {
    pub(super) fn new(open: bool) -> io::Result<Self> {
        Ok(Self {
            open: AtomicBool::new(open),
            sign: eventfd(u32::from(open), EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
        })
    }

    pub(super) fn is_open(&self) -> bool {
        self.open.load(Ordering::Acquire)
    }

    /// Only one thread does this.
    fn set(&self, open: bool) {
        if self.open.swap(open, Ordering::AcqRel) == open {
            return;
        }
        // Neither fails: the counter is 0 or 1, and this thread alone changes it.
        let _ = match open {
            true => rustix::io::write(&self.sign, &1u64.to_ne_bytes()),
            false => rustix::io::read(&self.sign, &mut [0u8; 8]),
        };
    }

    pub(super) fn sign(&self) -> BorrowedFd<'_> {
        self.sign.as_fd()
    }
}

/// Where the agent says it: the last one that connected.
pub(super) struct Leash {
    listener: UnixListener,
    agent: Option<UnixStream>,
    free: bool,
}

impl Leash {
    pub(super) fn bind(path: &Path) -> Result<Self, TunnelError> {
        Ok(Self {
            listener: super::bind_local(path)?,
            agent: None,
            free: false,
        })
    }

    /// What wakes [`Leash::heed`].
    pub(super) fn watch<'a>(&'a self, slots: &mut Vec<PollFd<'a>>) {
        slots.push(PollFd::new(&self.listener, PollFlags::IN));
        slots.extend(self.agent.iter().map(|agent| PollFd::new(agent, PollFlags::IN)));
    }

    /// Does what the agent says; holds when it is gone.
    pub(super) fn heed(&mut self, gate: &Gate) {
        while let Ok((agent, _)) = self.listener.accept() {
            // What the one before allowed goes with it.
            self.agent = agent.set_nonblocking(true).ok().map(|()| agent);
            gate.set(self.free);
        }
        let mut words = [0; 64];
        while let Some(agent) = &mut self.agent {
            match agent.read(&mut words) {
                Ok(0) => self.agent = None,
                Ok(count) => words[..count].iter().for_each(|word| match *word {
                    word if word == Word::Free as u8 => self.free = true,
                    word => gate.set(self.free || word == Word::Flow as u8),
                }),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => self.agent = None,
            }
        }
        if self.agent.is_none() || self.free {
            gate.set(self.free);
        }
    }
}
