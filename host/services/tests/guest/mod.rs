//! A guest: its card, its clients, and a desk with a clock.
#![allow(dead_code, reason = "each test uses its part of it")]

pub(crate) mod dhcp;

use std::{
    collections::{BTreeMap, VecDeque},
    net::{Ipv4Addr, Ipv6Addr},
    time::Duration,
};

use model::{
    Definition, HostId, Mac, PoolId, PortId, VmId,
    addressing::{Addressing, AddressingMethod, MetadataAccess, V6Prefix},
    host::Accelerator,
    layout::{Family, Layout},
    order::PortUse,
    template::Boot,
};
use services::{Desk, Guest, KEY_BYTES, Key, SERVICE_V4, Told};
use smoltcp::{
    iface::{Config, Interface, SocketHandle, SocketSet},
    phy::{ChecksumCapabilities, Device, DeviceCapabilities, Medium, RxToken, TxToken},
    socket::tcp,
    time::Instant,
    wire::{HardwareAddress, IpAddress, IpCidr, IpProtocol, Ipv4Packet, Ipv4Repr, UdpPacket, UdpRepr},
};
use uuid::Uuid;

pub(crate) const MAC: Mac = Mac([0x02, 0x5e, 0x10, 0x00, 0x00, 0x01]);
pub(crate) const OTHER: Mac = Mac([0x02, 0x5e, 0x10, 0x00, 0x00, 0x02]);
const IP: Ipv4Addr = Ipv4Addr::new(10, 91, 0, 7);
const PORT: PortId = PortId(Uuid::from_u128(5));

pub(crate) fn at(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

pub(crate) fn definition() -> Definition {
    let v6 = V6Prefix {
        address: "fd00:91::".parse().unwrap(),
        gateway: Some("fe80::1".parse().unwrap()),
    };
    Definition {
        template: None,
        vm: VmId(Uuid::from_u128(1)),
        name: "web1".parse().unwrap(),
        layout: Layout {
            version: 1,
            family: Family::Q35,
            machine: "pc-q35-7.2".into(),
            accelerator: Accelerator::Tcg,
            cpu: "max".into(),
            vcpus: 2,
            memory_mib: 512,
            devices: vec![],
            seed: None,
        },
        boot: Boot::Bios,
        pool: PoolId(Uuid::from_u128(4)),
        volumes: vec![],
        ports: vec![PortUse {
            policy: model::PortPolicy::default(),
            port: PORT,
            mac: MAC,
            ip: IP,
            prefix: 24,
            gateway: Some([10, 91, 0, 1].into()),
            mtu: 1450,
            v6: Some(v6.address_of(MAC)),
            addressing: Addressing {
                method: AddressingMethod::Dhcp,
                v6: Some(v6),
                dns: vec!["9.9.9.9".parse().unwrap(), "2620:fe::fe".parse().unwrap()],
                search: Some("a.example".into()),
                lease_s: 600,
                metadata: MetadataAccess::Token,
            },
        }],
    }
}

pub(crate) fn told() -> Told {
    Told {
        hostname: "web1.example".into(),
        public_keys: vec!["ssh-ed25519 AAAAC3Nz me".into()],
        user_data: Some(vec![b'u'; 60_000]),
        network_config: None,
    }
}

/// A desk and its clock.
pub(crate) struct Clocked {
    desk: Desk,
    now: Duration,
    /// What can be said of what its guest was told.
    pub(crate) told: Option<Told>,
}

pub(crate) fn desk() -> Clocked {
    desk_of(&definition(), 1)
}

pub(crate) fn desk_of(definition: &Definition, host: u128) -> Clocked {
    let guest = Guest::at(definition, HostId(Uuid::from_u128(host)), PORT).unwrap();
    let now = at(1_000_000);
    Clocked {
        desk: Desk::new(guest, Key::new([7; KEY_BYTES]), 1, now),
        now,
        told: Some(told()),
    }
}

impl Clocked {
    /// What a frame leads to at once.
    pub(crate) fn ask(&mut self, frame: &[u8]) -> Vec<Vec<u8>> {
        let mut out = vec![];
        self.desk.take(frame, self.now, &mut out);
        if self.desk.asks() {
            self.desk.tell(self.told.clone(), self.now, &mut out);
        }
        out
    }

    /// What time leads to.
    pub(crate) fn wait(&mut self, ms: u64) -> Vec<Vec<u8>> {
        let (end, mut out) = (self.now + at(ms), vec![]);
        while let Some(due) = self.desk.due(self.now).filter(|due| *due <= end) {
            self.now = self.now.max(due);
            self.desk.tick(self.now, &mut out);
        }
        self.now = end;
        out
    }
}

fn ethernet(mac: Mac, kind: [u8; 2], payload: &[u8]) -> Vec<u8> {
    [&[0xff; 6][..], &mac.0, &kind, payload].concat()
}

/// A datagram whose UDP checksum is left to the network card, as guests do.
pub(crate) fn ipv4_udp(mac: Mac, from: (Ipv4Addr, u16), to: (Ipv4Addr, u16), payload: &[u8]) -> Vec<u8> {
    let udp = UdpRepr {
        src_port: from.1,
        dst_port: to.1,
    };
    let ip = Ipv4Repr {
        src_addr: from.0,
        dst_addr: to.0,
        next_header: IpProtocol::Udp,
        payload_len: 8 + payload.len(),
        hop_limit: 64,
    };
    let mut bytes = vec![0; 28 + payload.len()];
    let mut packet = Ipv4Packet::new_unchecked(&mut bytes);
    ip.emit(&mut packet, &ChecksumCapabilities::default());
    let (from, to) = (IpAddress::Ipv4(from.0), IpAddress::Ipv4(to.0));
    let emit = |room: &mut [u8]| room.copy_from_slice(payload);
    let checksums = ChecksumCapabilities::ignored();
    udp.emit(
        &mut UdpPacket::new_unchecked(packet.payload_mut()),
        &from,
        &to,
        payload.len(),
        emit,
        &checksums,
    );
    ethernet(mac, [8, 0], &bytes)
}

fn sum(from: Ipv6Addr, to: Ipv6Addr, message: &[u8]) -> u16 {
    let length = u32::try_from(message.len()).unwrap().to_be_bytes();
    let all = [&from.octets()[..], &to.octets(), &length, &[0, 0, 0, 58], message].concat();
    let words = all
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

pub(crate) fn icmp6(mac: Mac, from: Ipv6Addr, to: Ipv6Addr, mut message: Vec<u8>) -> Vec<u8> {
    let checksum = sum(from, to, &message);
    message[2..4].copy_from_slice(&checksum.to_be_bytes());
    let length = u16::try_from(message.len()).unwrap().to_be_bytes();
    let packet = [
        &[0x60, 0, 0, 0][..],
        &length,
        &[58, 255],
        &from.octets(),
        &to.octets(),
        &message,
    ]
    .concat();
    ethernet(mac, [0x86, 0xdd], &packet)
}

pub(crate) struct Icmp6 {
    pub(crate) from: Ipv6Addr,
    pub(crate) hops: u8,
    pub(crate) message: Vec<u8>,
}

pub(crate) fn read_icmp6(frame: &[u8]) -> Icmp6 {
    let ip = &frame[14..];
    let address = |from: usize| Ipv6Addr::from(<[u8; 16]>::try_from(&ip[from..from + 16]).unwrap());
    let length = usize::from(u16::from_be_bytes([ip[4], ip[5]]));
    let message = ip[40..40 + length].to_vec();
    assert_eq!(sum(address(8), address(24), &message), 0, "its checksum");
    Icmp6 {
        from: address(8),
        hops: ip[7],
        message,
    }
}

/// Options by type, each without type and length.
pub(crate) fn ndp_options(mut bytes: &[u8]) -> BTreeMap<u8, Vec<u8>> {
    let mut all = BTreeMap::new();
    while let [kind, units, ..] = bytes {
        let length = usize::from(*units) * 8;
        all.insert(*kind, bytes[2..length].to_vec());
        bytes = &bytes[length..];
    }
    all
}

/// A request's bytes.
pub(crate) fn http(method: &str, path: &str, headers: &[&str]) -> String {
    let headers: String = headers.iter().map(|header| format!("{header}\r\n")).collect();
    format!("{method} {path} HTTP/1.1\r\nHost: 169.254.169.254\r\n{headers}\r\n")
}

#[derive(Default)]
struct Wire {
    in_: VecDeque<Vec<u8>>,
    out: Vec<Vec<u8>>,
}

struct In(Vec<u8>);

impl RxToken for In {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

struct Out<'w>(&'w mut Vec<Vec<u8>>);

impl TxToken for Out<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, length: usize, f: F) -> R {
        let mut packet = vec![0; length];
        let result = f(&mut packet);
        self.0.push(packet);
        result
    }
}

impl Device for Wire {
    type RxToken<'a> = In;
    type TxToken<'a> = Out<'a>;

    fn receive(&mut self, _: Instant) -> Option<(In, Out<'_>)> {
        let packet = self.in_.pop_front()?;
        Some((In(packet), Out(&mut self.out)))
    }

    fn transmit(&mut self, _: Instant) -> Option<Out<'_>> {
        Some(Out(&mut self.out))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        capabilities.max_transmission_unit = 1450;
        capabilities
    }
}

/// A guest's TCP client at its desk.
pub(crate) struct Client {
    pub(crate) desk: Clocked,
    mac: Mac,
    wire: Wire,
    interface: Interface,
    sockets: SocketSet<'static>,
    source: u16,
    hops: u8,
}

impl Client {
    pub(crate) fn new(desk: Clocked) -> Self {
        Self::as_(desk, MAC, IP)
    }

    pub(crate) fn as_(desk: Clocked, mac: Mac, ip: Ipv4Addr) -> Self {
        let mut wire = Wire::default();
        let mut interface = Interface::new(Config::new(HardwareAddress::Ip), &mut wire, Instant::ZERO);
        interface.update_ip_addrs(|all| all.push(IpCidr::new(ip.into(), 24)).unwrap());
        interface.routes_mut().add_default_ipv4_route(SERVICE_V4).unwrap();
        Self {
            desk,
            mac,
            wire,
            interface,
            sockets: SocketSet::new(vec![]),
            source: 49_152,
            hops: 0,
        }
    }

    fn exchange(&mut self) {
        for _ in 0..200 {
            let now = Instant::from_micros(i64::try_from(self.desk.now.as_micros()).unwrap());
            self.interface.poll(now, &mut self.wire, &mut self.sockets);
            if self.wire.out.is_empty() {
                break;
            }
            for packet in std::mem::take(&mut self.wire.out) {
                for frame in self.desk.ask(&ethernet(self.mac, [8, 0], &packet)) {
                    let length = usize::from(u16::from_be_bytes([frame[16], frame[17]]));
                    let data = length > 40 + 20;
                    if data {
                        self.hops = frame[14 + 8];
                    }
                    self.wire.in_.push_back(frame[14..14 + length].to_vec());
                }
            }
            self.desk.now += at(1);
        }
    }

    /// A connection, if there is somebody.
    pub(crate) fn connect(&mut self) -> Option<SocketHandle> {
        let buffer = |bytes| tcp::SocketBuffer::new(vec![0; bytes]);
        let mut socket = tcp::Socket::new(buffer(128 << 10), buffer(64 << 10));
        self.source += 1;
        socket
            .connect(self.interface.context(), (SERVICE_V4, 80), self.source)
            .unwrap();
        let handle = self.sockets.add(socket);
        self.exchange();
        let up = self.sockets.get::<tcp::Socket<'_>>(handle).state() == tcp::State::Established;
        if !up {
            self.sockets.remove(handle);
        }
        up.then_some(handle)
    }

    /// Status, body, and the hop limit that the answer had.
    pub(crate) fn ask(&mut self, request: &str) -> (u16, String, u8) {
        let handle = self.connect().expect("the service is there");
        let socket = self.sockets.get_mut::<tcp::Socket<'_>>(handle);
        socket.send_slice(request.as_bytes()).unwrap();
        self.exchange();
        let socket = self.sockets.get_mut::<tcp::Socket<'_>>(handle);
        let mut bytes = vec![0; 128 << 10];
        let length = socket.recv_slice(&mut bytes).unwrap_or(0);
        bytes.truncate(length);
        socket.close();
        self.exchange();
        self.sockets.remove(handle);
        let text = String::from_utf8(bytes).unwrap();
        let (head, body) = text
            .split_once("\r\n\r\n")
            .unwrap_or_else(|| panic!("no answer: {text}"));
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        let length = head
            .lines()
            .find_map(|line| line.strip_prefix("Content-Length: "))
            .unwrap();
        assert_eq!(length.parse::<usize>().unwrap(), body.len());
        (status, body.to_owned(), self.hops)
    }

    pub(crate) fn get(&mut self, path: &str, headers: &[&str]) -> (u16, String, u8) {
        self.ask(&http("GET", path, headers))
    }

    pub(crate) fn put(&mut self, path: &str, headers: &[&str]) -> (u16, String, u8) {
        self.ask(&http("PUT", path, headers))
    }
}
