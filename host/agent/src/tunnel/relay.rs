//! The hot loop: bytes between one Unix socket and one TLS connection, both ways, with each end of stream passed on.
//!
//! One thread serves one connection, so that parallel migration channels use several processors. Reads are large, a burst
//! of records leaves in one vectored write, and nothing waits for more to come: what was read is sent at once.
//!
//! What a migration over it costs against QEMU's own TLS is measured by `cargo xtask bench migrate`.

use std::io::{self, Read as _, Write as _};
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::event::{PollFd, PollFlags, poll};
use rustls::Connection;

use super::leash::Gate;

/// Bytes taken from a socket at once.
const CHUNK_BYTES: usize = 256 * 1024;
/// A record that was begun in the last chunk ends in this one, so slightly more than a chunk can come out.
const PLAIN_BYTES: usize = CHUNK_BYTES + 32 * 1024;

/// Why a connection ended before both its directions did.
#[derive(Debug, thiserror::Error)]
pub enum RelayError {
    /// QEMU's socket failed; it is gone.
    #[error("QEMU closed its side of the migration stream")]
    Local(#[source] io::Error),
    /// The network connection failed.
    #[error("the connection to the other host failed")]
    Network(#[source] io::Error),
    /// The connection ended without its authenticated end: the other tunnel or host died, or somebody cut it.
    #[error("the other host's tunnel ended in the middle of the stream")]
    Truncated,
    /// What arrived is not what the peer sent.
    #[error("the encrypted stream was damaged")]
    Tls(#[from] rustls::Error),
}

/// Guest bytes carried so far, by all connections of one tunnel.
#[derive(Debug, Default)]
pub(super) struct Traffic {
    /// From QEMU here to the other host.
    pub(super) sent: AtomicU64,
    /// From the other host to QEMU here.
    pub(super) received: AtomicU64,
}

/// Which of the four socket directions may have something to do; cleared when the kernel says otherwise.
#[allow(
    clippy::struct_excessive_bools,
    reason = "four independent readiness bits, as poll gives them"
)]
struct Ready {
    local_read: bool,
    local_write: bool,
    net_read: bool,
    net_write: bool,
}

struct Relay<'a> {
    local: UnixStream,
    net: TcpStream,
    tls: Connection,
    traffic: &'a Traffic,
    /// Whether anything may be taken from QEMU.
    gate: &'a Gate,
    /// QEMU has closed its side: there is nothing left to hold.
    gone: bool,
    ready: Ready,
    chunk: Box<[u8]>,
    plain: Box<[u8]>,
    /// What of `plain` is still to be written to QEMU.
    pending: std::ops::Range<usize>,
    outgoing: Direction,
    incoming: Direction,
}

/// How far one direction has come.
#[derive(PartialEq, Eq, Clone, Copy)]
enum Direction {
    Open,
    /// Its source has ended; the end is not passed on yet.
    Ending,
    Closed,
}

/// Relays until both directions have ended, or one fails. Both sockets are closed on return. `tls` may hold bytes that
/// arrived with the end of the handshake.
pub(super) fn relay(
    net: TcpStream,
    tls: Connection,
    local: UnixStream,
    traffic: &Traffic,
    gate: &Gate,
) -> Result<(), RelayError> {
    net.set_nonblocking(true).map_err(RelayError::Network)?;
    local.set_nonblocking(true).map_err(RelayError::Local)?;
    let mut relay = Relay {
        local,
        net,
        tls,
        traffic,
        gate,
        gone: false,
        ready: Ready {
            local_read: true,
            local_write: true,
            net_read: true,
            net_write: true,
        },
        chunk: vec![0; CHUNK_BYTES].into_boxed_slice(),
        plain: vec![0; PLAIN_BYTES].into_boxed_slice(),
        pending: 0..0,
        outgoing: Direction::Open,
        incoming: Direction::Open,
    };
    relay.tls.set_buffer_limit(None);
    relay.take_plaintext()?;
    while relay.outgoing != Direction::Closed || relay.incoming != Direction::Closed {
        let moved = relay.outward()? | relay.inward()?;
        if !moved {
            relay.wait()?;
        }
    }
    Ok(())
}

impl Relay<'_> {
    /// From QEMU to the network. Returns whether anything moved.
    fn outward(&mut self) -> Result<bool, RelayError> {
        let mut moved = self.flush()?;
        if self.takes_outgoing() && self.ready.local_read && !self.is_held() {
            match some(self.local.read(&mut self.chunk)).map_err(RelayError::Local)? {
                None => self.ready.local_read = false,
                Some(0) => {
                    self.outgoing = Direction::Ending;
                    self.tls.send_close_notify();
                }
                Some(bytes) => {
                    // A short read means that the socket was emptied; asking again would only cost.
                    self.ready.local_read = bytes >= CHUNK_BYTES / 4;
                    self.tls
                        .writer()
                        .write_all(&self.chunk[..bytes])
                        .map_err(RelayError::Network)?;
                    self.traffic.sent.fetch_add(bytes as u64, Ordering::Relaxed);
                    moved = true;
                }
            }
            moved |= self.flush()?;
        }
        if self.outgoing == Direction::Ending && !self.tls.wants_write() {
            self.outgoing = Direction::Closed;
            // The peer may have closed both ways already; then there is nothing to end.
            let _ = self.net.shutdown(Shutdown::Write);
            moved = true;
        }
        Ok(moved)
    }

    fn takes_outgoing(&self) -> bool {
        self.outgoing == Direction::Open && !self.tls.wants_write()
    }

    fn is_held(&self) -> bool {
        !self.gate.is_open() && !self.gone
    }

    fn flush(&mut self) -> Result<bool, RelayError> {
        let mut moved = false;
        while self.ready.net_write && self.tls.wants_write() {
            match some(self.tls.write_tls(&mut &self.net)) {
                Ok(None) => self.ready.net_write = false,
                Ok(Some(_)) => moved = true,
                Err(error) => return Err(RelayError::Network(error)),
            }
        }
        Ok(moved)
    }

    /// From the network to QEMU. Returns whether anything moved.
    fn inward(&mut self) -> Result<bool, RelayError> {
        let mut moved = false;
        if self.pending.is_empty() && self.incoming == Direction::Open && self.ready.net_read {
            match some(self.net.read(&mut self.chunk)).map_err(RelayError::Network)? {
                None => self.ready.net_read = false,
                Some(0) => return Err(RelayError::Truncated),
                Some(bytes) => {
                    self.ready.net_read = bytes >= CHUNK_BYTES / 4;
                    self.decrypt(bytes)?;
                    moved = true;
                }
            }
        }
        while !self.pending.is_empty() && self.ready.local_write {
            match some((&self.local).write(&self.plain[self.pending.clone()])).map_err(RelayError::Local)? {
                None => self.ready.local_write = false,
                Some(bytes) => {
                    self.pending.start += bytes;
                    self.traffic.received.fetch_add(bytes as u64, Ordering::Relaxed);
                    moved = true;
                }
            }
        }
        if self.incoming == Direction::Ending && self.pending.is_empty() {
            self.incoming = Direction::Closed;
            let _ = self.local.shutdown(Shutdown::Write);
            moved = true;
        }
        Ok(moved)
    }

    fn decrypt(&mut self, bytes: usize) -> Result<(), RelayError> {
        // rustls takes 4 KiB of ciphertext a call; from memory that costs no system call.
        let chunk = std::mem::take(&mut self.chunk);
        let mut rest = &chunk[..bytes];
        let mut outcome = Ok(());
        while outcome.is_ok() && !rest.is_empty() && self.incoming == Direction::Open {
            outcome = self
                .tls
                .read_tls(&mut rest)
                .map_err(RelayError::Network)
                .and_then(|_| self.take_plaintext());
        }
        self.chunk = chunk;
        outcome
    }

    fn take_plaintext(&mut self) -> Result<(), RelayError> {
        if self.pending.is_empty() {
            self.pending = 0..0;
        }
        let state = self.tls.process_new_packets()?;
        let end = self.pending.end + state.plaintext_bytes_to_read();
        let room = self.plain.get_mut(self.pending.end..end).ok_or(RelayError::Truncated)?;
        self.tls.reader().read_exact(room).map_err(RelayError::Network)?;
        self.pending.end = end;
        if state.peer_has_closed() && self.incoming == Direction::Open {
            self.incoming = Direction::Ending;
        }
        Ok(())
    }

    fn wait(&mut self) -> Result<(), RelayError> {
        let (mut local, mut net) = (PollFlags::empty(), PollFlags::empty());
        let held = self.takes_outgoing() && self.is_held();
        if self.takes_outgoing() && !held {
            local |= PollFlags::IN;
        }
        if !self.pending.is_empty() {
            local |= PollFlags::OUT;
        }
        if self.incoming == Direction::Open && self.pending.is_empty() {
            net |= PollFlags::IN;
        }
        if self.tls.wants_write() {
            net |= PollFlags::OUT;
        }
        // A direction that nobody waits for must not end the wait by a hang-up alone; negative descriptors are not
        // offered by safe code, so such a socket is left out.
        let mut slots = Vec::with_capacity(3);
        // Of a QEMU that is held, its end is waited for.
        let watches = (held || !local.is_empty(), !net.is_empty());
        if watches.0 {
            slots.push(PollFd::from_borrowed_fd(self.local.as_fd(), local));
        }
        if watches.1 {
            slots.push(PollFd::from_borrowed_fd(self.net.as_fd(), net));
        }
        if held {
            slots.push(PollFd::from_borrowed_fd(self.gate.sign(), PollFlags::IN));
        }
        match poll(&mut slots, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(RelayError::Network(error.into())),
        }
        let mut slots = slots.iter();
        let mut seen = |watched: bool| match watched {
            true => slots.next().map_or(PollFlags::empty(), PollFd::revents),
            false => PollFlags::empty(),
        };
        let (local, net) = (seen(watches.0), seen(watches.1));
        let failed = PollFlags::ERR | PollFlags::HUP;
        self.gone |= held && local.intersects(failed);
        self.ready.local_read |= held || local.intersects(PollFlags::IN | failed);
        self.ready.local_write |= local.intersects(PollFlags::OUT | failed);
        self.ready.net_read |= net.intersects(PollFlags::IN | failed);
        self.ready.net_write |= net.intersects(PollFlags::OUT | failed);
        Ok(())
    }
}

/// `None` where the kernel says "not now".
fn some(outcome: io::Result<usize>) -> io::Result<Option<usize>> {
    match outcome {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => Ok(None),
        Err(error) => Err(error),
    }
}
