//! One value of every message of version 1, every kind of payload included.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};

use model::addressing::{Addressing, AddressingMethod, MetadataAccess, V6Prefix};
use model::host::{Accelerator, Hypervisor, PoolFacts};
use model::layout::{Device, DeviceKind, Family};
use model::operation::Progress;
use model::order::*;
use model::policy::{Allowed, Filter, Flow, Protocol, RateLimit, Traffic};
use model::refusal::Code;
use model::seed::{GuestSeed, UserData};
use model::storage::Format;
use model::telemetry::*;
use model::template::{Blob, Boot, Content, Disk, Seed};
use model::*;
use uuid::Uuid;
use wire::*;

fn id<T: From<Uuid>>(n: u128) -> T {
    Uuid::from_u128(0x0197_b2a0_0000_7000_8000_0000_0000_0000 + n).into()
}

fn blob(n: u8) -> Blob {
    Blob {
        digest: Digest([n; 32]),
        size_bytes: 4096,
    }
}

fn refusal() -> Refusal {
    Refusal::new(Code::HostFailed, "QEMU ended: no space left").hint("free space on the pool")
}

fn terms() -> Terms {
    Terms {
        vm: id(1),
        operation: id(2),
        source: id(3),
        source_boot: id(4),
        destination: id(5),
        destination_boot: id(6),
        held: Generation(1),
        granted: Generation(2),
        reclaimed: Generation(3),
        run: true,
        deadline: Millis(600_000),
        settle: Millis(20_000),
    }
}

fn relay() -> Relay {
    Relay {
        vm: id(1),
        granted: Generation(2),
        from: id(3),
        to: id(5),
        message: Message::Release,
    }
}

fn place() -> VolumePlace {
    VolumePlace {
        volume: id(7),
        pool: id(8),
        format: Format::Qcow2,
    }
}

fn addressing() -> Addressing {
    Addressing {
        method: AddressingMethod::Dhcp,
        v6: Some(V6Prefix {
            address: "fd00:91::".parse().unwrap(),
            gateway: Some("fe80::1".parse().unwrap()),
        }),
        dns: vec!["9.9.9.9".parse().unwrap(), "2620:fe::fe".parse().unwrap()],
        search: Some("a.example".into()),
        lease_s: 600,
        metadata: MetadataAccess::Open,
    }
}

fn boot() -> Boot {
    Boot::Direct {
        kernel: blob(1),
        initrd: blob(2),
        cmdline: "console=ttyS0".into(),
    }
}

fn definition() -> Box<Definition> {
    let device = |name: &str, slot, kind| Device {
        id: name.into(),
        bus: "pcie.0".into(),
        slot,
        kind,
    };
    Box::new(Definition {
        template: None,
        vm: id(1),
        name: "web1".parse().unwrap(),
        layout: layout::Layout {
            version: 1,
            family: Family::Q35,
            machine: "pc-q35-7.2".into(),
            accelerator: Accelerator::Kvm,
            cpu: "Nehalem".into(),
            vcpus: 2,
            memory_mib: 512,
            devices: vec![
                device("net0", 2, DeviceKind::Net { port: id(9) }),
                device("disk0", 10, DeviceKind::Disk { volume: id(7) }),
            ],
            seed: None,
        },
        boot: boot(),
        pool: id(8),
        volumes: vec![VolumeUse {
            place: place(),
            size_bytes: 1 << 30,
            base: Some(VolumeBase {
                digest: Digest([3; 32]),
                format: Format::Raw,
            }),
        }],
        ports: vec![PortUse {
            port: id(9),
            mac: Mac([2, 0, 0x5e, 0x10, 0, 1]),
            ip: Ipv4Addr::new(10, 91, 0, 10),
            prefix: 24,
            gateway: Some(Ipv4Addr::new(10, 91, 0, 1)),
            mtu: 1500,
            v6: None,
            addressing: model::addressing::Addressing::default(),
            policy: model::PortPolicy::default(),
        }],
    })
}

fn verbs() -> Vec<Verb> {
    vec![
        Verb::Start {
            definition: definition(),
            paused: false,
            seed: None,
        },
        Verb::Stop { grace: Millis(30_000) },
        Verb::Kill,
        Verb::Reboot,
        Verb::Pause,
        Verb::Resume,
        Verb::Remove { volumes: vec![place()] },
        Verb::Receive {
            terms: terms(),
            definition: definition(),
        },
        Verb::Send {
            terms: terms(),
            to: Endpoint {
                address: IpAddr::V4(Ipv4Addr::new(10, 90, 0, 2)),
                tunnel_port: 40_001,
                peer_port: 7445,
            },
        },
        Verb::Cancel { terms: terms() },
    ]
}

fn happenings() -> Vec<Happening> {
    let reason = || "the source went silent".to_owned();
    let off = |cause| Happening::Off { cause };
    vec![
        Happening::Running,
        Happening::Paused,
        off(OffCause::Guest),
        off(OffCause::Ordered),
        off(OffCause::Died { detail: reason() }),
        off(OffCause::HostRebooted),
        Happening::Rebooted,
        Happening::Removed,
        Happening::Refused { reason: refusal() },
        Happening::Receiving { tunnel_port: 40_001 },
        Happening::Copying,
        Happening::Stopped,
        Happening::Released,
        Happening::Activated {
            resumed_at_ms: Some(1_790_000_000_000),
        },
        Happening::Voided { reason: reason() },
        Happening::Kept { reason: refusal() },
        Happening::Reclaimed { reason: reason() },
        Happening::TornDown {
            receipt: Box::new(Receipt {
                algorithm: "pre-copy".into(),
                bytes: Some(1 << 29),
                rounds: vec![Round::default()],
                ..Receipt::default()
            }),
            stopped_at_ms: Some(1_790_000_000_000),
        },
        Happening::Unknown { reason: reason() },
        Happening::TooLate,
    ]
}

fn facts() -> HostFacts {
    HostFacts {
        boot: id(4),
        address: IpAddr::V4(Ipv4Addr::new(10, 90, 0, 1)),
        peer_port: 7445,
        cpus: 8,
        memory_mib: 32_768,
        hypervisor: Hypervisor {
            kind: "qemu".into(),
            version: "10.0.2".into(),
            accelerator: Accelerator::Tcg,
            accelerator_reason: "/dev/kvm is not there".into(),
            machines: BTreeMap::from([
                (Family::Q35, "pc-q35-10.0".into()),
                (Family::Pc, "pc-i440fx-10.0".into()),
            ]),
            machine_types: BTreeSet::from(["pc-q35-7.2".into()]),
            migration: BTreeSet::from(["multifd".into()]),
        },
        pools: vec![PoolFacts {
            id: id(8),
            name: "local".parse().unwrap(),
            capacity_bytes: 1 << 40,
            free_bytes: 1 << 39,
            silent_since: None,
        }],
        agent_version: "0.1.0".into(),
    }
}

fn report(what: Happening) -> Report {
    Report::Vm(Box::new(VmReport {
        vm: id(1),
        generation: Generation(1),
        revision: Revision(4),
        operation: Some(id(2)),
        what,
    }))
}

fn progress() -> Progress {
    Progress {
        doing: "copying memory".into(),
        bytes: 1 << 20,
        remaining_bytes: Some(1 << 19),
        round: Some(2),
    }
}

fn telemetry() -> Telemetry {
    let stall = |n| {
        Some(Stall {
            some_us: n,
            full_us: Some(n / 2),
        })
    };
    let disk = DiskFigures {
        read_bytes: 1 << 30,
        written_bytes: 1 << 20,
        reads: 400,
        writes: 30,
    };
    let network = NetworkFigures {
        received_bytes: 1 << 22,
        sent_bytes: 1 << 21,
        received_dropped: 2,
        sent_dropped: 1,
    };
    let pressure = Pressure {
        cpu: stall(10),
        memory: stall(20),
        io: None,
    };
    let host = HostFigures {
        cpus: 4,
        cpu: CpuTimes {
            user_ms: 1000,
            system_ms: 200,
            idle_ms: 9000,
            iowait_ms: 30,
            steal_ms: 4,
        },
        memory_bytes: 8 << 30,
        memory_available_bytes: 6 << 30,
        pressure,
        pools: vec![PoolFigures {
            pool: id(8),
            name: "shared".parse().unwrap(),
            capacity_bytes: 1 << 40,
            free_bytes: 1 << 39,
            device: Some(DeviceFigures { disk, busy_ms: 77 }),
        }],
        uplinks: vec![UplinkFigures {
            name: "eth0".to_owned(),
            network,
        }],
    };
    let vm = VmFigures {
        vm: id(1),
        started_ticks: 4711,
        cpu_ms: 900,
        cpu_wait_ms: Some(12),
        memory_bytes: 300 << 20,
        disk: Some(disk),
        network,
        pressure,
    };
    Telemetry {
        clock_ms: 123_456,
        host,
        vms: vec![vm],
    }
}

fn vm_order(verb: Verb) -> Order {
    Order::Vm(Box::new(VmOrder {
        epoch: Epoch(1),
        vm: id(1),
        generation: Generation(1),
        revision: Revision(4),
        operation: id(2),
        verb,
    }))
}

// tidy: long because it is a list, a sample for each frame.
/// All frames from agent to controller.
pub(crate) fn ups() -> Vec<(String, Up)> {
    let observed = happenings().into_iter().map(|what| VmObserved {
        vm: id(1),
        generation: Generation(1),
        revision: Revision(4),
        what,
    });
    let mut reports = vec![
        ("facts".to_owned(), Report::Facts(Box::new(facts()))),
        (
            "inventory".to_owned(),
            Report::Inventory {
                vms: observed.clone().collect(),
            },
        ),
        (
            "inventory-part".to_owned(),
            Report::InventoryPart {
                vms: observed.take(1).collect(),
                after: Some(id(20)),
                up_to: Some(id(1)),
            },
        ),
        (
            "template".to_owned(),
            Report::Template(TemplateReport {
                operation: id(2),
                template: id(10),
                pool: id(8),
                refused: Some(refusal()),
                content: Some(Box::new(Content {
                    boot: boot(),
                    disk: None,
                    memory_mib_min: 64,
                    seed: Seed::None,
                })),
            }),
        ),
        (
            "port".to_owned(),
            Report::Port(PortReport {
                port: id(7),
                revision: Revision(3),
                refused: Some(refusal()),
            }),
        ),
        ("relay".to_owned(), Report::Relay(relay())),
    ];
    reports.extend(
        happenings()
            .into_iter()
            .enumerate()
            .map(|(n, what)| (format!("vm-{n:02}"), report(what))),
    );
    let hello = Up::Hello(Hello {
        version_min: 1,
        version_max: 1,
        build: "0.1.0".into(),
        incarnation: id(11),
        acknowledged: Sequence(7),
        epoch: Epoch(1),
    });
    let mut ups = vec![
        ("hello".to_owned(), hello),
        (
            "progress".to_owned(),
            Up::Progress {
                operation: id(2),
                progress: progress(),
            },
        ),
        (
            "telemetry".to_owned(),
            Up::Telemetry {
                telemetry: Box::new(telemetry()),
            },
        ),
        (
            "console-refused".to_owned(),
            Up::ConsoleRefused {
                console: id(12),
                reason: refusal(),
            },
        ),
        (
            "ports".to_owned(),
            Up::Ports {
                ports: vec![PortTraffic {
                    port: id(7),
                    traffic: traffic(),
                }],
            },
        ),
        ("heartbeat".to_owned(), Up::Heartbeat),
        ("close".to_owned(), Up::Close { reason: refusal() }),
    ];
    ups.extend(reports.into_iter().map(|(name, report)| {
        let sequence = Sequence(8);
        (format!("report-{name}"), Up::Report { sequence, report })
    }));
    ups
}

fn start_seeded() -> Verb {
    Verb::Start {
        definition: Box::new(Definition {
            layout: definition().layout.with_seed(),
            ..*definition()
        }),
        paused: false,
        seed: Some(Box::new(GuestSeed {
            hostname: "web1.example".into(),
            ssh_keys: vec!["ssh-ed25519 AAAAC3Nz me".into()],
            user_data: Some(UserData::new("#cloud-config\n{}\n".into())),
        })),
    }
}

fn start_addressed() -> Verb {
    let mut definition = definition();
    definition.ports.iter_mut().for_each(|port| {
        port.addressing = addressing();
        port.v6 = addressing().v6.map(|prefix| prefix.address_of(port.mac));
    });
    Verb::Start {
        definition,
        paused: false,
        seed: None,
    }
}

fn traffic() -> Traffic {
    Traffic {
        received_bytes: 1 << 40,
        received_frames: 1 << 30,
        sent_bytes: 1514,
        sent_frames: 1,
        spoofed_frames: 2,
        filtered_to_guest_frames: 3,
        filtered_from_guest_frames: 4,
    }
}

/// What goes with a guest's port.
fn port_state() -> Peer {
    Peer::Port(PortState {
        vm: id(1),
        granted: Generation(5),
        port: id(7),
        flows: vec![Flow {
            remote: "10.0.0.9".parse().unwrap(),
            protocol: 6,
            guest_port: 40_000,
            remote_port: 443,
            ending: true,
            expires_s: 119,
        }],
        traffic: Some(traffic()),
    })
}

fn port_order() -> PortOrder {
    let limit = RateLimit {
        bytes_per_s: 1_000_000,
        burst_bytes: Some(65_536),
    };
    let allowed = |protocol, ports: Option<&str>, remote: Option<&str>| Allowed {
        protocol,
        ports: ports.map(|ports| ports.parse().unwrap()),
        remote: remote.map(|range| vec![range.parse().unwrap()]),
    };
    let policy = PortPolicy {
        revision: Revision(3),
        link_down: true,
        allowed: vec!["10.0.0.0/8".parse().unwrap()],
        filter: Some(Filter {
            ingress: vec![allowed(Protocol::Tcp, Some("80-443"), Some("2001:db8::/32"))],
            egress: vec![allowed(Protocol::Any, None, None)],
        }),
        to_guest: Some(limit),
        from_guest: Some(RateLimit {
            burst_bytes: None,
            ..limit
        }),
        floor: Some(125_000),
    };
    let port = definition().ports[0].clone();
    PortOrder {
        epoch: Epoch(1),
        vm: id(1),
        port: PortUse { policy, ..port },
    }
}

fn start_fetched() -> Verb {
    Verb::Start {
        definition: Box::new(Definition {
            template: Some(template_source()),
            ..*definition()
        }),
        paused: false,
        seed: None,
    }
}

/// All frames from controller to agent.
pub(crate) fn downs() -> Vec<(String, Down)> {
    let template = |verb| {
        Order::Template(TemplateOrder {
            epoch: Epoch(1),
            operation: id(2),
            template: id(10),
            pool: id(8),
            verb,
        })
    };
    let disk = Disk {
        blob: blob(3),
        format: Format::Qcow2,
        size_bytes: 1 << 30,
    };
    let content = |boot| Content {
        boot,
        disk: Some(disk),
        memory_mib_min: 64,
        seed: Seed::None,
    };
    let mut orders: Vec<(String, Order)> = verbs()
        .into_iter()
        .map(|verb| (format!("vm-{}", verb.name()), vm_order(verb)))
        .collect();
    orders.push(("vm-start-seeded".into(), vm_order(start_seeded())));
    orders.push(("vm-start-addressed".into(), vm_order(start_addressed())));
    let fetch = |boot| template(TemplateVerb::Fetch { content: content(boot) });
    let drop = |others| TemplateVerb::Drop {
        blobs: vec![Digest([3; 32])],
        others,
    };
    let other = PoolBlobs {
        pool: id(13),
        blobs: vec![Digest([1; 32]), Digest([3; 32])],
    };
    orders.push(("vm-start-fetched".into(), vm_order(start_fetched())));
    orders.push(("lend".into(), Order::Lend(lend())));
    orders.push(("template-fetch-direct".into(), fetch(boot())));
    orders.push(("template-fetch-bios".into(), fetch(Boot::Bios)));
    orders.push(("template-drop".into(), template(drop(vec![]))));
    orders.push(("template-drop-in-two".into(), template(drop(vec![other]))));
    orders.push(("port".into(), Order::Port(Box::new(port_order()))));
    orders.push(("relay".into(), Order::Relay(relay())));
    let accepted = Down::Accepted(Accepted {
        version: 1,
        build: "0.1.0".into(),
        epoch: Epoch(1),
        received: Sequence(7),
    });
    let console = Down::OpenConsole {
        console: id(12),
        vm: id(1),
        generation: Generation(1),
        ticket: Ticket::new("once"),
    };
    let mut downs = vec![
        ("accepted".to_owned(), accepted),
        ("ack".to_owned(), Down::Ack { sequence: Sequence(8) }),
        ("open-console".to_owned(), console),
        ("heartbeat".to_owned(), Down::Heartbeat),
        ("close".to_owned(), Down::Close { reason: refusal() }),
    ];
    downs.extend(
        orders
            .into_iter()
            .map(|(name, order)| (format!("order-{name}"), Down::Order { order })),
    );
    downs
}

/// All frames between agents.
pub(crate) fn peers() -> Vec<(String, Peer)> {
    let word = |(n, message)| (format!("word-{n}"), Peer::Word(Relay { message, ..relay() }));
    let words = [Message::Release, Message::Run, Message::Void, Message::Ask];
    let mut peers = vec![
        (
            "hello".to_owned(),
            Peer::Hello {
                version_min: 1,
                version_max: 1,
            },
        ),
        ("accepted".to_owned(), Peer::Accepted { version: 1 }),
        ("heartbeat".to_owned(), Peer::Heartbeat),
        ("missed".to_owned(), Peer::Missed(missed())),
        ("port".to_owned(), port_state()),
        (
            "borrow".to_owned(),
            Peer::Borrow {
                version_min: 1,
                version_max: 1,
                digest: Digest([3; 32]),
                from_bytes: 1 << 20,
            },
        ),
        ("lent".to_owned(), Peer::Lent { size_bytes: 1 << 28 }),
        (
            "not-lent".to_owned(),
            Peer::NotLent {
                reason: "the controller did not say that this blob may be lent to that host".into(),
            },
        ),
    ];
    peers.extend(words.into_iter().enumerate().map(word));
    peers
}

fn template_source() -> TemplateSource {
    TemplateSource {
        name: "debian".parse().unwrap(),
        blobs: vec![blob(1), blob(2), blob(3)],
        holders: vec![Holder {
            host: id(3),
            address: IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)),
            peer_port: 7000,
        }],
    }
}

fn lend() -> Lend {
    Lend {
        epoch: Epoch(1),
        template: id(11),
        pool: id(8),
        to: id(5),
        blobs: vec![Digest([1; 32]), Digest([3; 32])],
    }
}

fn missed() -> Missed {
    let broadcast = [&[0; 10][..], &[0xff; 6], &[2, 0, 0x5e, 0x10, 0, 9], &[8, 6], &[0; 46]].concat();
    Missed {
        vm: id(1),
        granted: Generation(2),
        port: id(9),
        frames: vec![GuestFrame(broadcast), GuestFrame((0..24).collect())],
    }
}

/// Joining and renewing.
pub(crate) fn join_request() -> JoinRequest {
    JoinRequest {
        token: Ticket::new("gwj1.x"),
        csr_pem: "-----BEGIN CERTIFICATE REQUEST-----\n".into(),
        name: "h1".parse().unwrap(),
    }
}

/// The answer to [`join_request`].
pub(crate) fn join_response() -> JoinResponse {
    JoinResponse {
        name: None,
        host: id(3),
        certificate_pem: "-----BEGIN CERTIFICATE-----\n".into(),
        ca_pem: "-----BEGIN CERTIFICATE-----\n".into(),
        agent_endpoint: "controller.example:7444".into(),
        cluster: id(13),
    }
}

/// A renewal.
pub(crate) fn renew_request() -> RenewRequest {
    RenewRequest {
        csr_pem: "-----BEGIN CERTIFICATE REQUEST-----\n".into(),
    }
}

/// The answer to [`renew_request`].
pub(crate) fn renew_response() -> RenewResponse {
    RenewResponse {
        certificate_pem: "-----BEGIN CERTIFICATE-----\n".into(),
    }
}

/// A problem with all its fields.
pub(crate) fn problem() -> Problem {
    Problem::of(&refusal(), Some(id(2)))
}
