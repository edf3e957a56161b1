//! DHCP as a client writes and reads it, by hand: the server's own codec is not asked.

use std::net::Ipv4Addr;

use model::Mac;

use super::ipv4_udp;

/// A broadcast of a client that has no address.
pub(crate) fn frame(mac: Mac, kind: u8, options: &[(u8, &[u8])]) -> Vec<u8> {
    frame_from(mac, kind, Ipv4Addr::UNSPECIFIED, options)
}

/// A message of a client that has an address.
pub(crate) fn frame_from(mac: Mac, kind: u8, has: Ipv4Addr, options: &[(u8, &[u8])]) -> Vec<u8> {
    let mut message = vec![1, 1, 6, 0, 0xde, 0xad, 0xbe, 0xef, 0, 0, 0, 0];
    message.extend(has.octets());
    message.resize(28, 0);
    message.extend(mac.0);
    message.resize(236, 0);
    message.extend([0x63, 0x82, 0x53, 0x63, 53, 1, kind]);
    for (kind, data) in options {
        message.extend([*kind, u8::try_from(data.len()).unwrap()]);
        message.extend(*data);
    }
    // As udhcpc and systemd-networkd ask.
    message.extend([55, 4, 1, 3, 6, 121, 255]);
    ipv4_udp(mac, (Ipv4Addr::UNSPECIFIED, 68), (Ipv4Addr::BROADCAST, 67), &message)
}

/// Type, given address and options of a server's message.
pub(crate) fn read(frame: &[u8]) -> (u8, Ipv4Addr, Vec<(u8, Vec<u8>)>) {
    let message = &frame[42..];
    assert_eq!((message[0], &message[4..8]), (2, &[0xde, 0xad, 0xbe, 0xef][..]));
    let given = Ipv4Addr::from(<[u8; 4]>::try_from(&message[16..20]).unwrap());
    let mut options = vec![];
    let mut rest = &message[240..];
    while let [kind, length, tail @ ..] = rest {
        if *kind == 255 {
            break;
        }
        let (data, tail) = tail.split_at(usize::from(*length));
        options.push((*kind, data.to_vec()));
        rest = tail;
    }
    let kind = options.iter().find(|(kind, _)| *kind == 53).unwrap().1[0];
    (kind, given, options)
}
