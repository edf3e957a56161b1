//! TCP for one guest, in user space, where only its frames and ours meet: networks may use the same addresses twice.
//!
//! ```text
//!   IP packets ──▶ smoltcp ──▶ connection: bytes ─▶ request ─▶ (waits for what the guest was told) ─▶ answer ─▶ bytes
//! ```
//!
//! Bounded: so many connections, so many bytes each way, so long.

use std::{collections::VecDeque, time::Duration};

use smoltcp::{
    iface::{Config, Interface, PollResult, SocketHandle, SocketSet},
    phy::{Checksum, Device, DeviceCapabilities, Medium, RxToken, TxToken},
    socket::tcp::{Socket, SocketBuffer, State},
    time::Instant,
    wire::{HardwareAddress, IpCidr},
};

use crate::{
    SERVICE_V4, SERVICE_V6,
    http::{self, Method, Parsed, Reply, Request},
    metadata::Verdict,
};

pub(crate) const PORT: u16 = 80;
/// Connections of one guest at once; more are reset.
const CONNECTIONS_MAX: usize = 8;
const RECEIVE_BYTES: usize = 4 << 10;
const SEND_BYTES: usize = 16 << 10;
/// Longest life of a connection, and longest silence.
const LIFE_MAX: Duration = Duration::from_secs(60);
const SILENCE_MAX: smoltcp::time::Duration = smoltcp::time::Duration::from_secs(10);
const HOP_LIMIT: u8 = 64;
/// What a token travels: not past the guest itself, if that is a router for others.
const TOKEN_HOP_LIMIT: u8 = 1;
/// Turns between what the network and what the connections do, at one time.
const TURNS_MAX: usize = 8;
/// Largest IP packet of ours, bytes.
const PACKET_BYTES_MAX: u16 = 1500;

/// The guest's link, as smoltcp sees it: packets that came, packets that go.
struct Link {
    came: VecDeque<Vec<u8>>,
    goes: Vec<Vec<u8>>,
    mtu: usize,
}

struct Came(Vec<u8>);

impl RxToken for Came {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

struct Goes<'l>(&'l mut Vec<Vec<u8>>);

impl TxToken for Goes<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, length: usize, f: F) -> R {
        let mut packet = vec![0; length];
        let result = f(&mut packet);
        self.0.push(packet);
        result
    }
}

impl Device for Link {
    type RxToken<'a> = Came;
    type TxToken<'a> = Goes<'a>;

    fn receive(&mut self, _: Instant) -> Option<(Came, Goes<'_>)> {
        let packet = self.came.pop_front()?;
        Some((Came(packet), Goes(&mut self.goes)))
    }

    fn transmit(&mut self, _: Instant) -> Option<Goes<'_>> {
        Some(Goes(&mut self.goes))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        capabilities.max_transmission_unit = self.mtu;
        // Guests leave their checksums to their network card, which is the host's memory.
        capabilities.checksum.tcp = Checksum::Tx;
        capabilities
    }
}

/// A connection, or a place for one.
struct Connection {
    handle: SocketHandle,
    since: Option<Duration>,
    request: Vec<u8>,
    waits: Option<Request>,
    answer: Vec<u8>,
    sent: usize,
    last: bool,
}

impl Connection {
    fn new(sockets: &mut SocketSet<'static>) -> Self {
        Self {
            handle: sockets.add(listening()),
            since: None,
            request: vec![],
            waits: None,
            answer: vec![],
            sent: 0,
            last: false,
        }
    }

    fn give(&mut self, reply: &Reply, head_only: bool, close: bool) {
        self.answer = reply.bytes(head_only, close);
        self.sent = 0;
        self.last = close;
    }
}

fn listening() -> Socket<'static> {
    let buffer = |bytes| SocketBuffer::new(vec![0; bytes]);
    let mut socket = Socket::new(buffer(RECEIVE_BYTES), buffer(SEND_BYTES));
    socket.set_timeout(Some(SILENCE_MAX));
    socket.set_nagle_enabled(false);
    socket
        .listen(PORT)
        .expect("a new socket listens at a port that is not zero");
    socket
}

/// A guest's connections.
pub(crate) struct Stack {
    link: Link,
    interface: Interface,
    sockets: SocketSet<'static>,
    connections: Vec<Connection>,
    used: Duration,
}

impl Stack {
    /// With none. The seed makes its first sequence numbers hard to guess.
    pub(crate) fn new(mtu: u16, seed: u64, now: Duration) -> Self {
        let mut link = Link {
            came: VecDeque::new(),
            goes: vec![],
            mtu: usize::from(mtu.min(PACKET_BYTES_MAX)),
        };
        let mut config = Config::new(HardwareAddress::Ip);
        config.random_seed = seed;
        let mut interface = Interface::new(config, &mut link, instant(now));
        interface.update_ip_addrs(|addresses| {
            // Two fit.
            let _ = addresses.push(IpCidr::new(SERVICE_V4.into(), 32));
            let _ = addresses.push(IpCidr::new(SERVICE_V6.into(), 128));
        });
        let routes = interface.routes_mut();
        // Everything is on this link; two routes fit.
        let _ = routes.add_default_ipv4_route(SERVICE_V4);
        let _ = routes.add_default_ipv6_route(SERVICE_V6);
        let mut sockets = SocketSet::new(vec![]);
        let connections = (0..CONNECTIONS_MAX).map(|_| Connection::new(&mut sockets)).collect();
        Self {
            link,
            interface,
            sockets,
            connections,
            used: now,
        }
    }

    /// Takes an IP packet from the guest.
    pub(crate) fn take(&mut self, packet: Vec<u8>, now: Duration) {
        self.link.came.push_back(packet);
        self.used = now;
    }

    /// Does all that can be done now; `decide` says what a request leads to. Packets for the guest go to `out`.
    pub(crate) fn turn(&mut self, now: Duration, decide: &dyn Fn(&Request) -> Verdict, out: &mut Vec<Vec<u8>>) {
        for _ in 0..TURNS_MAX {
            let polled = self.interface.poll(instant(now), &mut self.link, &mut self.sockets);
            let mut moved = false;
            for connection in &mut self.connections {
                moved |= serve(connection, &mut self.sockets, now, decide);
            }
            if !moved && polled == PollResult::None {
                break;
            }
        }
        out.append(&mut self.link.goes);
    }

    /// When [`Stack::turn`] is due by itself; `None` while nobody is connected.
    pub(crate) fn due(&mut self, now: Duration) -> Option<Duration> {
        let wanted = self.interface.poll_delay(instant(now), &self.sockets);
        let ends = self
            .connections
            .iter()
            .filter_map(|one| one.since)
            .map(|since| since + LIFE_MAX);
        let wanted = wanted.map(|delay| now + Duration::from_micros(delay.total_micros()));
        wanted.into_iter().chain(ends).min()
    }

    /// Whether a request waits for what the guest was told.
    pub(crate) fn waits(&self) -> bool {
        self.connections.iter().any(|one| one.waits.is_some())
    }

    /// Nobody is connected, and for how long.
    pub(crate) fn idle(&self, now: Duration) -> Option<Duration> {
        let busy = self.connections.iter().any(|one| one.since.is_some());
        (!busy).then(|| now.saturating_sub(self.used))
    }
}

fn instant(now: Duration) -> Instant {
    Instant::from_micros(i64::try_from(now.as_micros()).unwrap_or(i64::MAX))
}

/// Carries a connection on by one step; whether there was one.
fn serve(
    one: &mut Connection,
    sockets: &mut SocketSet<'static>,
    now: Duration,
    decide: &dyn Fn(&Request) -> Verdict,
) -> bool {
    let socket = sockets.get_mut::<Socket<'static>>(one.handle);
    match socket.state() {
        State::Listen => return false,
        // Nothing is said any more; waiting for what may still be on its way would take the place of another.
        State::Closed | State::TimeWait => {
            sockets.remove(one.handle);
            *one = Connection::new(sockets);
            return true;
        }
        _ => {}
    }
    if now >= *one.since.get_or_insert(now) + LIFE_MAX {
        socket.abort();
        return true;
    }
    if one.sent < one.answer.len() {
        return send(one, socket);
    }
    if one.last {
        return false;
    }
    let mut moved = receive(one, socket);
    if one.waits.is_none() {
        match http::parse(&one.request) {
            Parsed::More => {}
            Parsed::Bad(status) => {
                one.request.clear();
                one.give(&Reply::status(status), false, true);
            }
            Parsed::Request(request, length) => {
                one.request.drain(..length);
                one.waits = Some(request);
            }
        }
    }
    if let Some(request) = &one.waits
        && let Verdict::Reply(reply) = decide(request)
    {
        let (head_only, close) = (request.method == Method::Head, request.close);
        let hops = if reply.ttl_s.is_some() {
            TOKEN_HOP_LIMIT
        } else {
            HOP_LIMIT
        };
        socket.set_hop_limit(Some(hops));
        one.waits = None;
        one.give(&reply, head_only, close);
    }
    if one.sent < one.answer.len() {
        moved = true;
    } else if one.waits.is_none() && !socket.may_recv() && socket.may_send() && socket.state() != State::SynReceived {
        // It has said all, and was answered.
        socket.close();
        one.last = true;
        moved = true;
    }
    moved
}

fn receive(one: &mut Connection, socket: &mut Socket<'static>) -> bool {
    let room = http::REQUEST_BYTES_MAX - one.request.len().min(http::REQUEST_BYTES_MAX);
    if room == 0 || !socket.can_recv() {
        return false;
    }
    let got = socket.recv(|bytes| {
        let taken = bytes.len().min(room);
        one.request.extend_from_slice(&bytes[..taken]);
        (taken, taken)
    });
    got.is_ok_and(|taken| taken > 0)
}

fn send(one: &mut Connection, socket: &mut Socket<'static>) -> bool {
    if !socket.can_send() {
        return false;
    }
    let Ok(sent) = socket.send_slice(&one.answer[one.sent..]) else {
        return false;
    };
    one.sent += sent;
    if one.sent == one.answer.len() {
        one.answer.clear();
        one.sent = 0;
        if one.last {
            socket.close();
        }
    }
    sent > 0
}
