//! One network connection of a tunnel before the guest's bytes flow: TLS, the migration's token, and the opening.
//!
//! ```text
//!   source                            destination
//!     | ---- TLS 1.3, both sides prove their host id ---- |
//!     | -- token (32 bytes) ---------------------------->  |  constant-time compare; else closed
//!     | <------------------------------- ACCEPTED (1) ---- |
//!     |  (QEMU connects here)                              |
//!     | -- OPEN (1) ------------------------------------>  |  connects to QEMU's incoming socket
//!     | <--------------------------------- OPENED (1) ---- |
//!     | <========= the guest's bytes, both ways =========> |
//! ```
//! The opening keeps QEMU's connections in order (QEMU 7.2 takes the first for the main channel), and lets the first
//! connection be made before the migration begins.

use std::io::{self, Read as _, Write as _};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use identity::WrongPeer;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::sockopt;
use rustls::Connection;

use super::spec::Token;

const ACCEPTED: u8 = 1;
const OPEN: u8 = 2;
const OPENED: u8 = 3;

/// Why a network connection came to nothing.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The socket failed or ended.
    #[error("the connection to the other host failed")]
    Io(#[from] io::Error),
    /// It is another host of the cluster, or the controller.
    #[error(transparent)]
    WrongPeer(WrongPeer),
    /// It is not of the cluster, or it refused us, or it does not speak TLS.
    #[error("the other end is not the expected host")]
    Tls(#[source] rustls::Error),
    /// Too slow.
    #[error("the other end did not finish {0} in time")]
    Deadline(&'static str),
    /// The right host, but of another migration.
    #[error("the other end showed the token of another migration")]
    Token,
    /// The right host sent something else than the protocol has here.
    #[error("the other end does not speak this tunnel's protocol")]
    Protocol,
}

impl From<rustls::Error> for LinkError {
    fn from(error: rustls::Error) -> Self {
        identity::tls::refused_as(&error).map_or(Self::Tls(error), Self::WrongPeer)
    }
}

/// Enough for 2 GB/s at a quarter of a millisecond there and back. Left to itself the kernel lets many megabytes wait for a QEMU that
/// takes memory in more slowly than the link brings it, and all of that lies between the source's stop and the guest's going on.
const NET_BUFFER_BYTES: usize = 512 * 1024;

/// A connection with its TLS state, used here with deadlines and afterwards by the relay.
pub(super) struct Link {
    /// The socket, non-blocking.
    pub(super) net: TcpStream,
    /// Its TLS state.
    pub(super) tls: Connection,
}

impl Link {
    /// Sets the socket up: no delay, and a peer that answers nothing for `silence_max` counts as dead.
    pub(super) fn new(net: TcpStream, tls: Connection, silence_max: Duration) -> Result<Self, LinkError> {
        net.set_nonblocking(true)?;
        net.set_nodelay(true)?;
        sockopt::set_socket_recv_buffer_size(&net, NET_BUFFER_BYTES).map_err(io::Error::from)?;
        sockopt::set_socket_send_buffer_size(&net, NET_BUFFER_BYTES).map_err(io::Error::from)?;
        let milliseconds = u32::try_from(silence_max.as_millis()).unwrap_or(u32::MAX);
        sockopt::set_tcp_user_timeout(&net, milliseconds).map_err(io::Error::from)?;
        sockopt::set_socket_keepalive(&net, true).map_err(io::Error::from)?;
        let probe = Duration::from_secs((silence_max.as_secs() / 4).max(1));
        sockopt::set_tcp_keepidle(&net, probe).map_err(io::Error::from)?;
        sockopt::set_tcp_keepintvl(&net, probe).map_err(io::Error::from)?;
        sockopt::set_tcp_keepcnt(&net, 3).map_err(io::Error::from)?;
        Ok(Self { net, tls })
    }

    /// The source's part until the destination has accepted it.
    pub(super) fn introduce(&mut self, token: &Token, deadline: Instant) -> Result<(), LinkError> {
        self.send(token.expose(), deadline)?;
        self.expect(ACCEPTED, deadline, "the handshake")
    }

    /// The destination's part until it knows the source and its migration; [`Self::welcome`] answers.
    pub(super) fn recognise(&mut self, token: &Token, deadline: Instant) -> Result<(), LinkError> {
        let mut given = [0; Token::BYTES];
        self.receive(&mut given, deadline, "the handshake")?;
        match token.matches(&given) {
            true => Ok(()),
            false => Err(LinkError::Token),
        }
    }

    /// The destination takes the connection.
    pub(super) fn welcome(&mut self, deadline: Instant) -> Result<(), LinkError> {
        self.send(&[ACCEPTED], deadline)
    }

    /// The source's QEMU has connected: returns when the destination's QEMU has too.
    pub(super) fn open(&mut self, deadline: Instant) -> Result<(), LinkError> {
        self.send(&[OPEN], deadline)?;
        self.expect(OPENED, deadline, "connecting to QEMU on the other host")
    }

    /// The destination waits for the source's QEMU.
    pub(super) fn wait_open(&mut self, deadline: Instant) -> Result<(), LinkError> {
        self.expect(OPEN, deadline, "the start of the migration")
    }

    /// The destination's QEMU has accepted.
    pub(super) fn opened(&mut self, deadline: Instant) -> Result<(), LinkError> {
        self.send(&[OPENED], deadline)
    }

    fn send(&mut self, bytes: &[u8], deadline: Instant) -> Result<(), LinkError> {
        self.tls.writer().write_all(bytes)?;
        while self.tls.is_handshaking() || self.tls.wants_write() {
            self.step(deadline, "the handshake")?;
        }
        Ok(())
    }

    fn expect(&mut self, byte: u8, deadline: Instant, what: &'static str) -> Result<(), LinkError> {
        let mut given = [0];
        self.receive(&mut given, deadline, what)?;
        match given[0] == byte {
            true => Ok(()),
            false => Err(LinkError::Protocol),
        }
    }

    fn receive(&mut self, into: &mut [u8], deadline: Instant, what: &'static str) -> Result<(), LinkError> {
        let mut have = 0;
        loop {
            match self.tls.reader().read(&mut into[have..]) {
                Ok(0) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
                Ok(bytes) => have += bytes,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.step(deadline, what)?,
                Err(error) => return Err(error.into()),
            }
            if have == into.len() {
                return Ok(());
            }
        }
    }

    /// Waits for the socket and moves TLS on by what it then has.
    fn step(&mut self, deadline: Instant, what: &'static str) -> Result<(), LinkError> {
        let mut wanted = PollFlags::empty();
        if self.tls.wants_write() {
            wanted |= PollFlags::OUT;
        }
        if self.tls.wants_read() {
            wanted |= PollFlags::IN;
        }
        if !wait(&self.net, wanted, deadline)? {
            return Err(LinkError::Deadline(what));
        }
        while self.tls.wants_write() {
            match self.tls.write_tls(&mut &self.net) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                outcome => outcome?,
            };
        }
        match self.tls.read_tls(&mut &self.net) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Ok(0) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
            outcome => outcome?,
        };
        if let Err(error) = self.tls.process_new_packets() {
            // Tell the peer why, as far as the socket takes it at once.
            let _ = self.tls.write_tls(&mut &self.net);
            return Err(error.into());
        }
        Ok(())
    }
}

/// Waits until a descriptor is ready; false when the deadline came first.
pub(super) fn wait(on: impl std::os::fd::AsFd, flags: PollFlags, deadline: Instant) -> io::Result<bool> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(false);
        }
        let left = Timespec::try_from(left).map_err(io::Error::other)?;
        match poll(&mut [PollFd::from_borrowed_fd(on.as_fd(), flags)], Some(&left)) {
            Ok(0) => return Ok(false),
            Ok(_) => return Ok(true),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}
