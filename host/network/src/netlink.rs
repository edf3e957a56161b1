//! A route-netlink socket and the few message shapes this crate sends: no task, no copies, an answer in microseconds.

use std::{io, os::fd::OwnedFd, time::Duration};

use rustix::{
    io::Errno,
    net::{self, AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, sockopt},
};

use crate::sys;

/// How long the kernel may take to answer before the request is given up: it answers at once unless its
/// configuration lock is held by another process.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// A listing that changed while it was read is read again, at most this often.
const DUMP_ATTEMPTS: usize = 8;
/// Largest answer datagram the kernel makes for a dump.
const ANSWER_BYTES_MAX: usize = 64 * 1024;

const HEADER_BYTES: usize = 16;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const FLAG_REQUEST: u16 = 0x1;
const FLAG_ACK: u16 = 0x4;
const FLAG_DUMP_INTERRUPTED: u16 = 0x10;
const FLAG_CAPPED: u16 = 0x100;
const FLAG_ACK_TLVS: u16 = 0x200;
const ATTR_NESTED: u16 = 0x8000;
const ATTR_KIND_MASK: u16 = 0x3fff;
const ACK_ATTR_MESSAGE: u16 = 1;

/// Replace what exists (for objects that are keyed, such as forwarding entries).
pub(crate) const FLAG_REPLACE: u16 = 0x100;
/// Fail if it exists.
pub(crate) const FLAG_EXCL: u16 = 0x200;
/// Answer with everything that matches.
pub(crate) const FLAG_DUMP: u16 = 0x300;
/// Create if it does not exist.
pub(crate) const FLAG_CREATE: u16 = 0x400;

/// Why the kernel did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum NetlinkError {
    /// The kernel refused; `detail` is its own explanation where it gave one.
    #[error("the kernel answered {errno}{}", detail.as_deref().map(|d| format!(" ({d})")).unwrap_or_default())]
    Refused {
        /// The error number.
        errno: Errno,
        /// The kernel's extended explanation.
        detail: Option<String>,
    },
    /// The socket failed, or no answer came in time.
    #[error("the netlink socket failed")]
    Socket(#[source] io::Error),
    /// The answer could not be read.
    #[error("the kernel's answer was cut short or malformed")]
    Malformed,
}

impl NetlinkError {
    /// The error number, when the kernel refused.
    pub(crate) fn errno(&self) -> Option<Errno> {
        match self {
            Self::Refused { errno, .. } => Some(*errno),
            Self::Socket(_) | Self::Malformed => None,
        }
    }
}

impl From<Errno> for NetlinkError {
    fn from(errno: Errno) -> Self {
        Self::Socket(errno.into())
    }
}

/// One request under construction.
#[derive(Clone, Debug)]
pub(crate) struct Message {
    bytes: Vec<u8>,
}

impl Message {
    /// A request of this kind whose fixed part is `body`.
    pub(crate) fn new(kind: u16, flags: u16, body: &[u8]) -> Self {
        let mut bytes = Vec::with_capacity(160);
        bytes.extend_from_slice(&0u32.to_ne_bytes());
        bytes.extend_from_slice(&kind.to_ne_bytes());
        bytes.extend_from_slice(&(flags | FLAG_REQUEST).to_ne_bytes());
        bytes.extend_from_slice(&[0; 8]);
        bytes.extend_from_slice(body);
        let mut message = Self { bytes };
        message.pad();
        message
    }

    /// Appends an attribute.
    pub(crate) fn attr(mut self, kind: u16, value: &[u8]) -> Self {
        let len = u16::try_from(value.len() + 4).expect("an attribute of ours fits 16 bits");
        self.bytes.extend_from_slice(&len.to_ne_bytes());
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(value);
        self.pad();
        self
    }

    /// Appends the fixed part of a nested request.
    pub(crate) fn raw(mut self, bytes: &[u8]) -> Self {
        self.bytes.extend_from_slice(bytes);
        self.pad();
        self
    }

    /// Appends a zero-terminated string attribute.
    pub(crate) fn text(self, kind: u16, value: &str) -> Self {
        let mut bytes = value.as_bytes().to_vec();
        bytes.push(0);
        self.attr(kind, &bytes)
    }

    /// Appends an attribute whose value is attributes.
    pub(crate) fn nest(mut self, kind: u16, fill: impl FnOnce(Self) -> Self) -> Self {
        let start = self.bytes.len();
        self.bytes.extend_from_slice(&[0; 4]);
        let mut message = fill(self);
        let len = u16::try_from(message.bytes.len() - start).expect("a nest of ours fits 16 bits");
        message.bytes[start..start + 2].copy_from_slice(&len.to_ne_bytes());
        message.bytes[start + 2..start + 4].copy_from_slice(&(kind | ATTR_NESTED).to_ne_bytes());
        message
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn finish(&self, sequence: u32, extra_flags: u16, out: &mut Vec<u8>) {
        let start = out.len();
        out.extend_from_slice(&self.bytes);
        let len = u32::try_from(self.bytes.len()).expect("a message of ours fits 32 bits");
        let flags = u16::from_ne_bytes([self.bytes[6], self.bytes[7]]) | extra_flags;
        out[start..start + 4].copy_from_slice(&len.to_ne_bytes());
        out[start + 6..start + 8].copy_from_slice(&flags.to_ne_bytes());
        out[start + 8..start + 12].copy_from_slice(&sequence.to_ne_bytes());
    }
}

/// Attributes of an answer, in order; ends silently at the first malformed one.
pub(crate) fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let len = usize::from(u16::from_ne_bytes(bytes.get(0..2)?.try_into().ok()?));
        let kind = u16::from_ne_bytes(bytes.get(2..4)?.try_into().ok()?) & ATTR_KIND_MASK;
        let value = bytes.get(4..len)?;
        bytes = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

/// A socket to the kernel's network configuration, of the network namespace it was opened in.
#[derive(Debug)]
pub(crate) struct Netlink {
    socket: OwnedFd,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Netlink {
    /// Opens the socket in the calling thread's network namespace.
    pub(crate) fn open() -> Result<Self, NetlinkError> {
        // No protocol is protocol 0: NETLINK_ROUTE.
        let socket = net::socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, None)?;
        sockopt::set_socket_timeout(&socket, sockopt::Timeout::Recv, Some(ANSWER_TIMEOUT))?;
        // Both only make answers better; a kernel without them still answers.
        let _ = sys::set_option(&socket, libc::SOL_NETLINK, libc::NETLINK_EXT_ACK, 1);
        let _ = sys::set_option(&socket, libc::SOL_NETLINK, libc::NETLINK_CAP_ACK, 1);
        Ok(Self {
            socket,
            sequence: 0,
            buffer: vec![0; ANSWER_BYTES_MAX],
        })
    }

    /// Sends all messages in one system call; the kernel executes them in order. Returns the first refusal,
    /// after all have been answered.
    pub(crate) fn execute(&mut self, messages: &[Message]) -> Result<(), NetlinkError> {
        let mut request = Vec::with_capacity(messages.iter().map(|m| m.bytes.len()).sum());
        let first = self.sequence.wrapping_add(1);
        for message in messages {
            self.sequence = self.sequence.wrapping_add(1);
            message.finish(self.sequence, FLAG_ACK, &mut request);
        }
        self.send(&request)?;
        let mut unanswered = messages.len();
        let mut outcome = Ok(());
        while unanswered > 0 {
            self.receive(|answer| {
                if answer.sequence.wrapping_sub(first) as usize >= messages.len() {
                    return Ok(()); // left over from a request that was given up
                }
                unanswered = unanswered.saturating_sub(1);
                match answer.acknowledgement()? {
                    Ok(()) => Ok(()),
                    Err(refusal) => {
                        if outcome.is_ok() {
                            outcome = Err(refusal);
                        }
                        Ok(())
                    }
                }
            })?;
        }
        outcome
    }

    /// Asks for one object and returns its payload, the part after the netlink header.
    pub(crate) fn get(&mut self, message: &Message) -> Result<Vec<u8>, NetlinkError> {
        self.sequence = self.sequence.wrapping_add(1);
        let wanted = self.sequence;
        let mut request = Vec::new();
        message.finish(wanted, 0, &mut request);
        self.send(&request)?;
        let mut found = None;
        while found.is_none() {
            self.receive(|answer| {
                if answer.sequence == wanted {
                    found = Some(match answer.kind {
                        NLMSG_ERROR => Err(answer.acknowledgement()?.err().unwrap_or(NetlinkError::Malformed)),
                        _ => Ok(answer.payload.to_vec()),
                    });
                }
                Ok(())
            })?;
        }
        found.unwrap_or(Err(NetlinkError::Malformed))
    }

    /// Asks for all objects; read again when they changed meanwhile.
    pub(crate) fn dump(&mut self, message: &Message) -> Result<Vec<Vec<u8>>, NetlinkError> {
        let mut objects = Vec::new();
        for _ in 0..DUMP_ATTEMPTS {
            objects.clear();
            if self.dump_once(message, &mut objects)? {
                return Ok(objects);
            }
        }
        Ok(objects)
    }

    /// Returns whether the listing was consistent.
    fn dump_once(&mut self, message: &Message, objects: &mut Vec<Vec<u8>>) -> Result<bool, NetlinkError> {
        self.sequence = self.sequence.wrapping_add(1);
        let wanted = self.sequence;
        let mut request = Vec::new();
        message.finish(wanted, FLAG_DUMP, &mut request);
        self.send(&request)?;
        let (mut done, mut consistent) = (false, true);
        while !done {
            self.receive(|answer| {
                if answer.sequence != wanted {
                    return Ok(());
                }
                consistent &= answer.flags & FLAG_DUMP_INTERRUPTED == 0;
                match answer.kind {
                    NLMSG_DONE => done = true,
                    NLMSG_ERROR => {
                        done = true;
                        answer.acknowledgement()??;
                    }
                    _ => objects.push(answer.payload.to_vec()),
                }
                Ok(())
            })?;
        }
        Ok(consistent)
    }

    fn send(&self, request: &[u8]) -> Result<(), NetlinkError> {
        let sent = rustix::io::retry_on_intr(|| net::send(&self.socket, request, SendFlags::empty()))?;
        if sent == request.len() {
            Ok(())
        } else {
            Err(NetlinkError::Malformed)
        }
    }

    /// Receives one datagram and hands out its messages.
    fn receive(&mut self, mut each: impl FnMut(Answer<'_>) -> Result<(), NetlinkError>) -> Result<(), NetlinkError> {
        let (len, _) =
            rustix::io::retry_on_intr(|| net::recv(&self.socket, self.buffer.as_mut_slice(), RecvFlags::empty()))?;
        let mut rest = &self.buffer[..len];
        while rest.len() >= HEADER_BYTES {
            let len = u32::from_ne_bytes([rest[0], rest[1], rest[2], rest[3]]) as usize;
            let payload = rest.get(HEADER_BYTES..len).ok_or(NetlinkError::Malformed)?;
            each(Answer {
                kind: u16::from_ne_bytes([rest[4], rest[5]]),
                flags: u16::from_ne_bytes([rest[6], rest[7]]),
                sequence: u32::from_ne_bytes([rest[8], rest[9], rest[10], rest[11]]),
                payload,
            })?;
            rest = rest.get(len.next_multiple_of(4)..).unwrap_or_default();
        }
        Ok(())
    }
}

struct Answer<'a> {
    kind: u16,
    flags: u16,
    sequence: u32,
    payload: &'a [u8],
}

impl Answer<'_> {
    /// Outer error: unreadable. Inner error: the kernel refused.
    fn acknowledgement(&self) -> Result<Result<(), NetlinkError>, NetlinkError> {
        if self.kind != NLMSG_ERROR {
            return Err(NetlinkError::Malformed);
        }
        let code = self
            .payload
            .get(0..4)
            .and_then(|b| b.try_into().ok())
            .map(i32::from_ne_bytes);
        match code.ok_or(NetlinkError::Malformed)? {
            0 => Ok(Ok(())),
            code => Ok(Err(NetlinkError::Refused {
                errno: Errno::from_raw_os_error(code.saturating_neg()),
                detail: self.detail(),
            })),
        }
    }

    fn detail(&self) -> Option<String> {
        if self.flags & FLAG_ACK_TLVS == 0 {
            return None;
        }
        // The request's header comes back, and the whole request unless the answer is capped.
        let echoed = if self.flags & FLAG_CAPPED == 0 {
            u32::from_ne_bytes(self.payload.get(4..8)?.try_into().ok()?) as usize
        } else {
            HEADER_BYTES
        };
        let attrs = self.payload.get(4 + echoed.next_multiple_of(4)..)?;
        let (_, text) = attributes(attrs).find(|(kind, _)| *kind == ACK_ATTR_MESSAGE)?;
        Some(String::from_utf8_lossy(text.strip_suffix(&[0]).unwrap_or(text)).into_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_survive_a_round_trip_and_stop_at_garbage() {
        let message = Message::new(1, 0, &[]).text(3, "br0").nest(18, |m| m.attr(1, &[7]));
        let found: Vec<_> = attributes(&message.bytes[HEADER_BYTES..]).collect();
        assert_eq!(found[0], (3, &b"br0\0"[..]));
        assert_eq!(found[1].0, 18);
        assert_eq!(attributes(found[1].1).next(), Some((1, &[7u8][..])));
        assert_eq!(attributes(&[3, 0, 1, 0]).next(), None, "a length below its own header");
        assert_eq!(attributes(&[200, 0, 1, 0, 9]).next(), None, "a length past the end");
    }

    #[test]
    fn a_refusal_carries_the_kernels_own_words() {
        let mut netlink = Netlink::open().unwrap();
        // RTM_GETLINK of a name that does not exist.
        let absent = Message::new(18, 0, &[0; 16]).text(3, "no-such-link");
        let refusal = netlink.get(&absent).unwrap_err();
        assert_eq!(refusal.errno(), Some(Errno::NODEV), "{refusal}");
    }
}
