//! What guests ask their host: heard at their taps, answered there, and let no further.
//!
//! ```text
//!   guest ──▶ tap ──┬─copy─▶ Questions ─▶ (the agent's answer) ─▶ Questions::answer ──▶ guest, past the bridge
//!                   └──────▶ bridge: dropped by its first rule where the host answers
//! ```
//!
//! A copy is taken before the bridge sees a frame (packet(7)), of what a classic BPF program lets through: nothing else wakes anyone.
//! Taps carry their marks as interface groups, so the rules are the same few for any number of ports.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use rustix::{
    io::Errno,
    net::{AddressFamily, SocketFlags, SocketType, socket_with, sockopt},
};

use crate::{
    Network, Port, PortError,
    link::Change,
    nft::NftError,
    port::failure,
    standstill::{FrameError, failure as frame_failure},
    sys,
};

/// Groups of taps whose guests are answered: about themselves alone, or about their addresses as well.
const METADATA_GROUP: u32 = 0x6777_0001;
const DHCP_GROUP: u32 = 0x6777_0002;
/// Bytes of questions that may wait at one port; the kernel counts them with its own bookkeeping, and twice this.
const WAITING_BYTES_MAX: usize = 64 << 10;
/// The longest question that is read; longer ones are none.
const QUESTION_BYTES_MAX: usize = 2048;

/// What is answered at a tap goes no further. Earlier than rules of ports, which judge the rest.
const RULES: &str = "\
add table bridge godwit-questions
add chain bridge godwit-questions prerouting { type filter hook prerouting priority -300; policy accept; }
flush chain bridge godwit-questions prerouting
add rule bridge godwit-questions prerouting iifgroup { 0x67770001, 0x67770002 } ip daddr 169.254.169.254 drop
add rule bridge godwit-questions prerouting iifgroup { 0x67770001, 0x67770002 } arp daddr ip 169.254.169.254 drop
add rule bridge godwit-questions prerouting iifgroup { 0x67770001, 0x67770002 } ip6 daddr fd00:ec2::254 drop
add rule bridge godwit-questions prerouting iifgroup 0x67770002 udp dport 67 drop
";

/// What is answered at a tap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answered {
    /// Nothing: all that the guest asks goes to its network.
    Nothing,
    /// What it asks at 169.254.169.254 and fd00:ec2::254.
    Metadata,
    /// That, and DHCP.
    Dhcp,
}

/// The questions that a guest sends at a port: DHCP, router solicitations, and what is for 169.254.169.254 or fd00:ec2::254.
#[derive(Debug)]
pub struct Questions {
    socket: OwnedFd,
    port: Port,
    buffer: Vec<u8>,
    ended: bool,
}

impl Network {
    /// Sets up the rules by which what hosts answer goes no further than the tap. Setting them again changes nothing.
    ///
    /// # Errors
    /// [`NftError`], without the program, the privileges or the kernel's parts.
    pub fn ensure_answers(&self) -> Result<(), NftError> {
        self.nft.apply(RULES)
    }

    /// Says what is answered at a tap, which goes no further from now on.
    ///
    /// # Errors
    /// [`PortError`].
    pub fn set_answered(&self, port: &Port, answered: Answered) -> Result<(), PortError> {
        let group = match answered {
            Answered::Nothing => 0,
            Answered::Metadata => METADATA_GROUP,
            Answered::Dhcp => DHCP_GROUP,
        };
        let change = Change::of(port.index).group(group).message();
        self.slow()
            .execute(&[change])
            .map_err(failure(&port.tap, "mark what is answered at"))
    }

    /// Hears what a port's guest asks from now on; to be called in the network's own namespace.
    ///
    /// # Errors
    /// [`FrameError`].
    pub fn hear(&self, port: &Port) -> Result<Questions, FrameError> {
        let fail = frame_failure(&port.tap, "hear");
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::PACKET, SocketType::RAW, flags, None).map_err(&fail)?;
        // What goes out to the guest is not copied for this socket at all.
        sys::set_option(&socket, libc::SOL_PACKET, libc::PACKET_IGNORE_OUTGOING, 1).map_err(&fail)?;
        sockopt::set_socket_recv_buffer_size(&socket, WAITING_BYTES_MAX).map_err(&fail)?;
        sys::attach_filter(&socket, &mut questions()).map_err(&fail)?;
        sys::bind_to_interface(&socket, port.index).map_err(&fail)?;
        Ok(Questions {
            socket,
            port: port.clone(),
            buffer: vec![0; QUESTION_BYTES_MAX],
            ended: false,
        })
    }
}

impl Questions {
    /// The next frame that waits; `None` when none does now.
    ///
    /// # Errors
    /// Of the socket.
    pub fn next_frame(&mut self) -> io::Result<Option<&[u8]>> {
        let length = loop {
            match sys::receive(&self.socket, &mut self.buffer, false) {
                Ok(told) if told.len <= self.buffer.len() => break told.len,
                // Nobody asks in so many words.
                Ok(_) | Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(None),
                // Told once; what was received before can still be read.
                Err(Errno::NETDOWN) => self.ended = true,
                Err(errno) => return Err(errno.into()),
            }
        };
        Ok(Some(&self.buffer[..length]))
    }

    /// Gives the guest a whole Ethernet frame; no other port sees it. A full queue drops it, as any port does.
    ///
    /// # Errors
    /// [`FrameError`].
    pub fn answer(&self, frame: &[u8]) -> Result<(), FrameError> {
        match sys::send_frame(&self.socket, self.port.index, frame) {
            Ok(()) | Err(Errno::NOBUFS | Errno::AGAIN) => Ok(()),
            Err(errno) => Err(frame_failure(&self.port.tap, "answer at")(errno)),
        }
    }

    /// Whether the port is gone, or down.
    #[must_use]
    pub const fn is_ended(&self) -> bool {
        self.ended
    }
}

impl AsFd for Questions {
    /// Readable when a frame waits; in error once the port is gone.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// A step of a program whose jumps are to names.
struct Step {
    name: &'static str,
    code: u32,
    k: u32,
    /// Where to go if it holds, and if not; empty: the next step.
    then: &'static str,
    other: &'static str,
}

const LOAD_WORD: u32 = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
const LOAD_HALF: u32 = libc::BPF_LD | libc::BPF_H | libc::BPF_ABS;
const LOAD_BYTE: u32 = libc::BPF_LD | libc::BPF_B | libc::BPF_ABS;
const LOAD_HALF_AT: u32 = libc::BPF_LD | libc::BPF_H | libc::BPF_IND;
const LOAD_HEADER_LENGTH: u32 = libc::BPF_LDX | libc::BPF_B | libc::BPF_MSH;
const IF_EQUAL: u32 = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
const IF_SET: u32 = libc::BPF_JMP | libc::BPF_JSET | libc::BPF_K;
const RETURN: u32 = libc::BPF_RET | libc::BPF_K;

/// 169.254.169.254, and the words of fd00:ec2::254.
const SERVICE: u32 = 0xa9fe_a9fe;
const SERVICE_V6: [u32; 4] = [0xfd00_0ec2, 0, 0, 0x254];

/// A classic BPF program for what a guest may ask its host; see [`Questions`].
fn questions() -> Vec<libc::sock_filter> {
    let load = |name, code, k| Step {
        name,
        code,
        k,
        then: "",
        other: "",
    };
    let test = |name, code, k, then, other| Step {
        name,
        code,
        k,
        then,
        other,
    };
    let [w0, w1, w2, w3] = SERVICE_V6;
    assemble(&[
        load("", LOAD_HALF, 12),
        test("", IF_EQUAL, 0x0806, "arp", ""),
        test("", IF_EQUAL, 0x0800, "ipv4", ""),
        test("", IF_EQUAL, 0x86dd, "ipv6", "drop"),
        // Who has the service's address?
        load("arp", LOAD_WORD, 38),
        test("", IF_EQUAL, SERVICE, "take", "drop"),
        // To the service's address, or a whole datagram to a DHCP server.
        load("ipv4", LOAD_WORD, 30),
        test("", IF_EQUAL, SERVICE, "take", ""),
        load("", LOAD_BYTE, 23),
        test("", IF_EQUAL, 17, "", "drop"),
        load("", LOAD_HALF, 20),
        test("", IF_SET, 0x1fff, "drop", ""),
        load("", LOAD_HEADER_LENGTH, 14),
        load("", LOAD_HALF_AT, 16),
        test("", IF_EQUAL, 67, "take", "drop"),
        // To the service's address, or a solicitation of routers or for the service.
        load("ipv6", LOAD_WORD, 38),
        test("", IF_EQUAL, w0, "", "icmp"),
        load("", LOAD_WORD, 42),
        test("", IF_EQUAL, w1, "", "icmp"),
        load("", LOAD_WORD, 46),
        test("", IF_EQUAL, w2, "", "icmp"),
        load("", LOAD_WORD, 50),
        test("", IF_EQUAL, w3, "take", ""),
        load("icmp", LOAD_BYTE, 20),
        test("", IF_EQUAL, 58, "", "drop"),
        load("", LOAD_BYTE, 54),
        test("", IF_EQUAL, 133, "take", ""),
        test("", IF_EQUAL, 135, "", "drop"),
        load("", LOAD_WORD, 62),
        test("", IF_EQUAL, w0, "", "drop"),
        load("", LOAD_WORD, 74),
        test("", IF_EQUAL, w3, "take", "drop"),
        load("take", RETURN, u32::MAX),
        load("drop", RETURN, 0),
    ])
}

fn assemble(steps: &[Step]) -> Vec<libc::sock_filter> {
    let jump = |from: usize, to: &str| {
        let named = steps.iter().skip(from + 1).position(|step| step.name == to);
        let named = if to.is_empty() { Some(0) } else { named };
        named
            .and_then(|steps| u8::try_from(steps).ok())
            .expect("a program's jumps are short and lead on")
    };
    let steps = steps.iter().enumerate().map(|(at, step)| libc::sock_filter {
        code: step.code as u16,
        jt: jump(at, step.then),
        jf: jump(at, step.other),
        k: step.k,
    });
    steps.collect()
}
