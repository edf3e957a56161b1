//! What guests get from their desks: real clients' frames in, answers out; and nothing for those who are not who they say.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test ends where its promise is broken"
)]

mod guest;

use std::net::{Ipv4Addr, Ipv6Addr};

use guest::{Client, MAC, OTHER, definition, desk, desk_of, dhcp, http, ipv4_udp, told};
use model::{
    Mac,
    addressing::{AddressingMethod, MetadataAccess, link_local},
};
use proptest::prelude::*;
use services::{SERVICE_MAC, SERVICE_V4, SERVICE_V6};

const IP: Ipv4Addr = Ipv4Addr::new(10, 91, 0, 7);

/// Type, address and options of the one answer.
fn answered(frames: &[Vec<u8>]) -> (u8, Ipv4Addr, Vec<(u8, Vec<u8>)>) {
    let [frame] = frames else {
        panic!("{} frames", frames.len())
    };
    dhcp::read(frame)
}

fn option(options: &[(u8, Vec<u8>)], kind: u8) -> Option<Vec<u8>> {
    options.iter().find(|(of, _)| *of == kind).map(|(_, data)| data.clone())
}

#[test]
fn a_client_is_offered_its_address_and_all_that_the_network_says() {
    let mut desk = desk();
    let (kind, ip, options) = answered(&desk.ask(&dhcp::frame(MAC, 1, &[])));
    assert_eq!((kind, ip), (2, IP));
    let has = |kind: u8, data: &[u8]| assert_eq!(option(&options, kind).as_deref(), Some(data), "option {kind}");
    has(1, &[255, 255, 255, 0]);
    has(3, &[10, 91, 0, 1]);
    has(6, &[9, 9, 9, 9]);
    has(12, b"web1");
    has(15, b"a.example");
    has(26, &1450u16.to_be_bytes());
    has(51, &600u32.to_be_bytes());
    has(54, &SERVICE_V4.octets());
    has(58, &300u32.to_be_bytes());
    has(59, &525u32.to_be_bytes());
    has(119, b"\x01a\x07example\x00");
    // On-link to the services, and the way out again: clients that read these ignore the router.
    has(121, &[32, 169, 254, 169, 254, 0, 0, 0, 0, 0, 10, 91, 0, 1]);
    let (kind, ip, _) = answered(&desk.ask(&dhcp::frame(MAC, 3, &[(50, &IP.octets()), (54, &SERVICE_V4.octets())])));
    assert_eq!((kind, ip), (5, IP));
}

#[test]
fn a_lease_of_one_host_is_renewed_by_another_with_the_same_words() {
    let renew = dhcp::frame_from(MAC, 3, IP, &[]);
    let first = desk().ask(&renew);
    let elsewhere = desk_of(&definition(), 2).ask(&renew);
    assert_eq!(first, elsewhere);
    assert_eq!(answered(&first).0, 5);
}

#[test]
fn who_wants_another_address_is_told_no_and_who_means_another_server_nothing() {
    let mut desk = desk();
    let foreign = [10, 91, 0, 200];
    let (kind, ip, options) = answered(&desk.ask(&dhcp::frame(MAC, 3, &[(50, &foreign)])));
    assert_eq!((kind, ip, option(&options, 51)), (6, Ipv4Addr::UNSPECIFIED, None));
    let (kind, ..) = answered(&desk.ask(&dhcp::frame_from(MAC, 3, foreign.into(), &[])).clone());
    assert_eq!(kind, 6);
    assert!(
        desk.ask(&dhcp::frame(MAC, 3, &[(50, &IP.octets()), (54, &[10, 91, 0, 1])]))
            .is_empty()
    );
    // RELEASE, DECLINE: nothing is kept, so there is nothing to say.
    for kind in [4, 7] {
        assert!(desk.ask(&dhcp::frame_from(MAC, kind, IP, &[])).is_empty());
    }
    let (kind, ip, options) = answered(&desk.ask(&dhcp::frame_from(MAC, 8, IP, &[])));
    assert_eq!(
        (kind, ip, option(&options, 51)),
        (5, Ipv4Addr::UNSPECIFIED, None),
        "INFORM: no lease"
    );
    assert!(option(&options, 6).is_some());
}

#[test]
fn spoofed_relayed_and_malformed_questions_get_no_answer() {
    let good = dhcp::frame(MAC, 1, &[]);
    let silent = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut frame = good.clone();
        change(&mut frame);
        assert!(desk().ask(&frame).is_empty());
    };
    assert_eq!(desk().ask(&good).len(), 1);
    silent(&|frame| frame[6..12].copy_from_slice(&OTHER.0));
    // chaddr, giaddr, op, hlen, cookie: behind 14 + 20 + 8 bytes.
    silent(&|frame| frame[42 + 28..42 + 34].copy_from_slice(&OTHER.0));
    silent(&|frame| frame[42 + 24] = 10);
    silent(&|frame| frame[42] = 2);
    silent(&|frame| frame[44] = 16);
    silent(&|frame| frame[42 + 236] ^= 1);
    silent(&|frame| frame.truncate(42 + 239));
    // Of a network that does not ask for it.
    let mut quiet = definition();
    quiet.ports[0].addressing.method = AddressingMethod::Static;
    assert!(desk_of(&quiet, 1).ask(&good).is_empty());
}

#[test]
fn a_guest_that_asks_without_end_is_answered_so_often_a_second() {
    let mut desk = desk();
    let good = dhcp::frame(MAC, 1, &[]);
    let answers: usize = (0..1000).map(|_| desk.ask(&good).len()).sum();
    assert_eq!(answers, 16);
    desk.wait(1000);
    assert_eq!((0..1000).map(|_| desk.ask(&good).len()).sum::<usize>(), 8);
}

#[test]
fn the_services_address_is_found_by_the_ports_own_addresses_alone() {
    let asks = |mac: Mac, ip: Ipv4Addr, target: Ipv4Addr| {
        let mut frame = [&[0xff; 6][..], &mac.0, &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1], &mac.0].concat();
        frame.extend([&ip.octets()[..], &[0; 6], &target.octets()].concat());
        desk().ask(&frame)
    };
    let answer = asks(MAC, IP, SERVICE_V4);
    assert_eq!(answer[0][..12], [MAC.0, SERVICE_MAC.0].concat()[..]);
    assert_eq!(
        answer[0][20..32],
        [&[0, 2][..], &SERVICE_MAC.0, &SERVICE_V4.octets()].concat()[..]
    );
    assert!(asks(MAC, [10, 91, 0, 8].into(), SERVICE_V4).is_empty());
    assert!(asks(OTHER, IP, SERVICE_V4).is_empty());
    assert!(
        asks(MAC, IP, [10, 91, 0, 1].into()).is_empty(),
        "addresses of others are theirs"
    );
}

fn solicitation(kind: u8, from: Ipv6Addr, target: Option<Ipv6Addr>) -> Vec<u8> {
    let mut message = vec![kind, 0, 0, 0, 0, 0, 0, 0];
    message.extend(target.map(|target| target.octets()).into_iter().flatten());
    guest::icmp6(MAC, from, "ff02::2".parse().unwrap(), message)
}

#[test]
fn routers_are_advertised_when_asked_for_and_from_time_to_time() {
    let mut desk = desk();
    let asked = solicitation(133, Ipv6Addr::UNSPECIFIED, None);
    let frames = desk.ask(&asked);
    let advert = guest::read_icmp6(&frames[0]);
    assert_eq!((advert.from.to_string().as_str(), advert.hops), ("fe80::1", 255));
    let message = advert.message;
    assert_eq!(
        (message[0], message[5], &message[6..8]),
        (134, 0, &1800u16.to_be_bytes()[..])
    );
    let options = guest::ndp_options(&message[16..]);
    assert_eq!(options[&5][2..6], 1450u32.to_be_bytes());
    let prefix = &options[&3];
    assert_eq!((prefix[0], prefix[1]), (64, 0xc0));
    assert_eq!(prefix[14..30], "fd00:91::".parse::<Ipv6Addr>().unwrap().octets());
    assert_eq!(options[&25][6..22], "2620:fe::fe".parse::<Ipv6Addr>().unwrap().octets());
    assert_eq!(&options[&31][6..17], b"\x01a\x07example\x00");
    // By itself: soon, then within ten minutes.
    assert_eq!(desk.wait(1_000), frames);
    let in_ten_minutes = desk.wait(600_000);
    assert!((1..=3).contains(&in_ten_minutes.len()) && in_ten_minutes.iter().all(|frame| frame == &frames[0]));
    // Without a router nobody is one, and the address says so on each host.
    let mut lone = definition();
    lone.ports[0].addressing.v6.as_mut().unwrap().gateway = None;
    let advert = guest::read_icmp6(&desk_of(&lone, 1).ask(&asked)[0]);
    assert_eq!(
        (advert.from.to_string().as_str(), &advert.message[6..8]),
        ("fe80::a9fe:a9fe", &[0, 0][..])
    );
    // Of a network without IPv6, and a question that passed a router: nothing.
    let mut none = definition();
    none.ports[0].addressing.v6 = None;
    assert!(desk_of(&none, 1).ask(&asked).is_empty());
    let mut far = asked.clone();
    far[14 + 7] = 254;
    assert!(self::desk().ask(&far).is_empty());
}

#[test]
fn the_services_ipv6_address_is_found_too() {
    let found = desk().ask(&solicitation(135, link_local(MAC), Some(SERVICE_V6)));
    let answer = guest::read_icmp6(&found[0]);
    assert_eq!((answer.from, answer.message[0]), (SERVICE_V6, 136));
    assert_eq!(answer.message[26..32], SERVICE_MAC.0);
    assert!(
        desk()
            .ask(&solicitation(135, "fe80::1".parse().unwrap(), Some(SERVICE_V6)))
            .is_empty()
    );
}

#[test]
fn metadata_is_told_to_whom_it_is_about_with_a_token() {
    let mut client = Client::new(desk());
    let (status, _, hops) = client.get("/latest/meta-data/instance-id", &[]);
    assert_eq!((status, hops), (401, 64));
    let (status, token, hops) = client.put("/latest/api/token", &["X-aws-ec2-metadata-token-ttl-seconds: 60"]);
    assert_eq!(
        (status, token.len(), hops),
        (200, 80, 1),
        "a token goes no further than the guest"
    );
    let with = format!("X-aws-ec2-metadata-token: {token}");
    let mut get = |path: &str| {
        let (status, body, _) = client.get(path, &[&with]);
        assert_eq!(status, 200, "{path}: {body}");
        body
    };
    assert_eq!(get("/latest/meta-data/instance-id"), definition().vm.to_string());
    assert_eq!(get("/2021-03-23/meta-data/local-ipv4"), "10.91.0.7");
    assert_eq!(get("/latest/meta-data/mac"), MAC.to_string());
    assert_eq!(get("/latest/meta-data/local-hostname"), "web1.example");
    assert_eq!(get("/latest/meta-data/public-keys"), "0=key-0");
    assert_eq!(
        get("/latest/meta-data/public-keys/0/openssh-key"),
        "ssh-ed25519 AAAAC3Nz me"
    );
    assert_eq!(get("/latest/user-data").len(), told().user_data.unwrap().len());
    assert!(get("/latest/meta-data/").contains("placement/"));
    let card = format!("/latest/meta-data/network/interfaces/macs/{MAC}/");
    assert_eq!(get(&format!("{card}subnet-ipv4-cidr-block")), "10.91.0.0/24");
    assert_eq!(get(&format!("{card}ipv6s")), "fd00:91::5e:10ff:fe00:1");
    assert_eq!(client.get("/latest/meta-data/none", &[&with]).0, 404);
    assert_eq!(
        client.get("/latest/meta-data/mac", &["X-aws-ec2-metadata-token: 00"]).0,
        401
    );
    assert_eq!(
        client
            .get("/latest/meta-data/mac", &[&with, "X-Forwarded-For: 10.0.0.1"])
            .0,
        403
    );
    assert_eq!(
        client
            .put(
                "/latest/api/token",
                &["X-Forwarded-For: a", "X-aws-ec2-metadata-token-ttl-seconds: 60"]
            )
            .0,
        403
    );
    assert_eq!(
        client
            .put("/latest/api/token", &["X-aws-ec2-metadata-token-ttl-seconds: 21601"])
            .0,
        400
    );
    assert_eq!(client.put("/latest/api/token", &[]).0, 400);
    client.desk.wait(61_000);
    assert_eq!(client.get("/latest/meta-data/mac", &[&with]).0, 401, "it has an end");
}

#[test]
fn a_network_may_allow_it_without_a_token_or_not_at_all() {
    let with = |metadata| {
        let mut definition = definition();
        definition.ports[0].addressing.metadata = metadata;
        Client::new(desk_of(&definition, 1))
    };
    let mut open = with(MetadataAccess::Open);
    let (status, body, _) = open.get("/nocloud/meta-data", &[]);
    assert_eq!(status, 200);
    let meta: serde_json::Value = serde_json::from_str(&body).unwrap();
    assert_eq!(meta["local-hostname"], "web1.example");
    assert_eq!(open.get("/nocloud/user-data", &[]).0, 200);
    let mut off = with(MetadataAccess::Off);
    assert!(off.connect().is_none(), "nobody is there");
}

#[test]
fn what_cannot_be_read_now_is_not_told_to_be_nothing() {
    let mut definition = definition();
    definition.ports[0].addressing.metadata = MetadataAccess::Open;
    let mut client = Client::new(desk_of(&definition, 1));
    client.desk.told = None;
    assert_eq!(client.get("/latest/user-data", &[]).0, 503);
    client.desk.told = Some(told());
    assert_eq!(client.get("/latest/user-data", &[]).0, 200);
}

#[test]
fn connections_are_of_the_ports_own_addresses_and_bounded() {
    // A SYN that says to come from somebody else.
    for (mac, ip) in [(OTHER, IP), (MAC, Ipv4Addr::new(10, 91, 0, 8))] {
        let mut client = Client::as_(desk(), mac, ip);
        assert!(client.connect().is_none());
    }
    let mut client = Client::new(desk());
    // Each ends by itself: a hundred, one after the other, by those who wait for the end and by those who do not.
    for n in 0..100 {
        let (status, ..) = client.get(if n % 2 == 0 { "/" } else { "/latest" }, &["Connection: close"]);
        assert_eq!(status, 401);
    }
    let open: Vec<_> = (0..20).filter_map(|_| client.connect()).collect();
    assert_eq!(open.len(), 8);
    // Who says nothing is not waited for.
    client.desk.wait(70_000);
    assert_eq!(client.get("/", &[]).0, 401);
    let body = http("PUT", "/latest/api/token", &["Content-Length: 100000000"]);
    assert_eq!(client.ask(&body).0, 413);
}

#[test]
fn udp_that_is_no_dhcp_and_other_ports_are_not_answered() {
    let frame = ipv4_udp(MAC, (IP, 68), (SERVICE_V4, 69), b"x");
    assert!(desk().ask(&frame).is_empty());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Whatever a guest sends, nothing breaks, and there are never more answers than it is allowed.
    #[test]
    fn no_frame_breaks_a_desk(
        tails in proptest::collection::vec((0..6usize, proptest::collection::vec(any::<u8>(), 0..400)), 1..30)
    ) {
        let mut desk = desk();
        let mut answers = 0;
        for (kind, tail) in tails {
            let kinds: [&[u8]; 6] = [&[8, 6], &[8, 0], &[8, 0, 0x45], &[0x86, 0xdd], &[0x86, 0xdd, 0x60], &[]];
            let frame = [&[0xff; 6][..], &MAC.0, kinds[kind], &tail].concat();
            answers += desk.ask(&frame).len();
        }
        prop_assert!(answers <= 40);
        desk.wait(1000);
    }

    /// A question of a real client with some bytes changed.
    #[test]
    fn no_damage_of_a_question_breaks_a_desk(changes in proptest::collection::vec((0..300usize, any::<u8>()), 0..8)) {
        let mut frame = dhcp::frame(MAC, 3, &[(50, &IP.octets()), (61, &[1, 2, 3])]);
        let length = frame.len();
        for (place, byte) in changes {
            frame[place % length] = byte;
        }
        let _ = desk().ask(&frame);
    }
}
