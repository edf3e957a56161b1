//! A small world with a row of every kind.
#![allow(clippy::unwrap_used, unreachable_pub)]
#![allow(dead_code)] // each test program uses a part

use std::{collections::BTreeSet, net::Ipv4Addr};

use model::{
    AuditEntry, Change, Generation, Host, HostId, Mac, Millis, Name, Network, NetworkId, Notice, Operation,
    OperationId, OperationKind, OperationState, Order, Pool, PoolId, Port, PortId, Project, ProjectId, Refusal,
    Revision, Row, Subnet, SubnetId, Template, TemplateId, Timestamp, TokenId, User, UserId, Vm, VmId, VmSpec, VmState,
    VmStatus, Volume, VolumeId,
    access::{Actor, ApiToken, JoinToken, PasswordHash, Role, TokenHash, TokenKind, Via},
    audit::AuditResult,
    change::{Answer, OutboxRow},
    host::{Accelerator, HostSpec, HostStatus, Link},
    id::{Epoch, Sequence},
    layout::{Family, Layout},
    network::NetworkMode,
    operation::{Target, TargetKind},
    order::{Verb, VmOrder},
    seed::{GuestSeed, SeedRow, UserData},
    storage::{Format, PoolDriver},
    template::{Boot, Content, Seed, TemplateState},
    vm::Power,
};
use uuid::Uuid;

pub const PROJECT: u128 = 1;
pub const HOST: u128 = 2;
pub const POOL: u128 = 3;
pub const NETWORK: u128 = 4;
pub const SUBNET: u128 = 5;
pub const TEMPLATE: u128 = 6;

pub fn uuid(n: u128) -> Uuid {
    Uuid::from_u128(n)
}

pub fn name(text: &str) -> Name {
    text.parse().unwrap()
}

pub fn project_id() -> ProjectId {
    ProjectId(uuid(PROJECT))
}

pub fn put(rows: impl IntoIterator<Item = Row>) -> Vec<Change> {
    rows.into_iter().map(Change::Put).collect()
}

/// What every VM stands on.
pub fn base() -> Vec<Row> {
    let at = Timestamp(1_700_000_000_000);
    vec![
        Row::Project(Project {
            id: project_id(),
            name: name("default"),
            quota: Default::default(),
            used: Default::default(),
        }),
        Row::Host(Box::new(Host {
            id: HostId(uuid(HOST)),
            name: name("h1"),
            spec: HostSpec::default(),
            status: HostStatus {
                link: Link::Up,
                since: at,
                facts: None,
            },
            joined_at: at,
        })),
        Row::Pool(Pool {
            id: PoolId(uuid(POOL)),
            name: name("local"),
            driver: PoolDriver::Dir,
            hosts: BTreeSet::from([HostId(uuid(HOST))]),
            failure_domain: None,
        }),
        Row::Network(Network {
            id: NetworkId(uuid(NETWORK)),
            project: project_id(),
            name: name("default"),
            mode: NetworkMode::Bridged,
            mtu: 1500,
            addressing: model::addressing::Addressing::default(),
        }),
        Row::Subnet(Subnet {
            id: SubnetId(uuid(SUBNET)),
            network: NetworkId(uuid(NETWORK)),
            address: Ipv4Addr::new(10, 0, 0, 0),
            prefix: 8,
            gateway: None,
            first: Ipv4Addr::new(10, 0, 0, 10),
            last: Ipv4Addr::new(10, 255, 255, 250),
        }),
        Row::Template(Box::new(Template {
            id: TemplateId(uuid(TEMPLATE)),
            project: project_id(),
            name: name("micro"),
            content: Content {
                boot: Boot::Bios,
                disk: None,
                memory_mib_min: 64,
                seed: Seed::None,
            },
            state: TemplateState::Ready {
                pools: vec![PoolId(uuid(POOL))],
                fetching: Vec::new(),
            },
            created_at: at,
        })),
    ]
}

pub fn vm(n: u128) -> Vm {
    Vm {
        id: VmId(uuid(n)),
        project: project_id(),
        name: name(&format!("vm-{n:x}")),
        spec: VmSpec {
            template: TemplateId(uuid(TEMPLATE)),
            vcpus: 1,
            memory_mib: 512,
            family: Family::Q35,
            power: Power::On,
        },
        revision: Revision(1),
        layout: Layout {
            version: 1,
            family: Family::Q35,
            machine: "pc-q35-7.2".to_owned(),
            accelerator: Accelerator::Tcg,
            cpu: "max".to_owned(),
            vcpus: 1,
            memory_mib: 512,
            devices: Vec::new(),
            seed: None,
        },
        ports: vec![PortId(uuid(n + 1))],
        volumes: vec![VolumeId(uuid(n + 2))],
        status: VmStatus {
            state: VmState::Active,
            since: Timestamp(1_700_000_001_000),
            reason: None,
            host: Some(HostId(uuid(HOST))),
            generation: Generation(1),
            highest: Generation(1),
            ordered: Revision(1),
            observed: Revision(0),
            moving: None,
            cleared: BTreeSet::new(),
        },
        operation: Some(OperationId(uuid(n + 3))),
        created_at: Timestamp(1_700_000_000_500),
    }
}

pub fn port(n: u128) -> Port {
    let id = PortId(uuid(n + 1));
    Port {
        id,
        project: project_id(),
        network: NetworkId(uuid(NETWORK)),
        subnet: SubnetId(uuid(SUBNET)),
        mac: Mac::of_port(id),
        ip: Ipv4Addr::from(0x0a00_0000 + (n >> 8) as u32),
        v6: None,
        vm: Some(VmId(uuid(n))),
        bound: Some(HostId(uuid(HOST))),
        generation: Generation(1),
        rests_until: None,
        spec: Box::default(),
        applied: model::Revision(0),
    }
}

pub fn operation(n: u128, state: OperationState) -> Operation {
    Operation {
        id: OperationId(uuid(n + 3)),
        project: project_id(),
        subject: "admin".to_owned(),
        kind: OperationKind::CreateVm,
        target: Target {
            kind: TargetKind::Vm,
            id: uuid(n),
            name: name(&format!("vm-{n:x}")),
        },
        finished_at: state.is_over().then_some(Timestamp(1_700_000_002_000)),
        state,
        created_at: Timestamp(1_700_000_000_500),
        ends_by: Timestamp(1_700_000_600_000),
    }
}

pub fn answer(n: u128) -> Answer {
    Answer {
        project: project_id(),
        key: format!("key-{n:x}"),
        body_hash: [7; 32],
        operation: OperationId(uuid(n + 3)),
        at: Timestamp(1_700_000_000_500),
    }
}

pub fn notice(sequence: u64) -> Row {
    Row::Notice(Box::new(Notice {
        sequence: Sequence(sequence),
        at: Timestamp(1_700_000_000_500),
        project: Some(project_id()),
        what: "vm.active".to_owned(),
        kind: TargetKind::Vm,
        id: uuid(0x100),
        name: name("vm"),
        operation: None,
        detail: String::new(),
    }))
}

pub fn order(n: u128, revision: u64) -> Row {
    Row::Outbox(Box::new(OutboxRow {
        host: HostId(uuid(HOST)),
        order: Order::Vm(Box::new(VmOrder {
            epoch: Epoch(1),
            vm: VmId(uuid(n)),
            generation: Generation(1),
            revision: Revision(revision),
            operation: OperationId(uuid(n + 3)),
            verb: Verb::Stop {
                grace: Millis::seconds(30),
            },
        })),
    }))
}

/// What one accepted request to make a VM writes; `n` is a multiple of 256.
pub fn creation(n: u128, sequence: u64) -> Vec<Row> {
    vec![
        Row::Vm(Box::new(vm(n))),
        Row::Port(port(n)),
        Row::Volume(Volume {
            id: VolumeId(uuid(n + 2)),
            project: project_id(),
            pool: PoolId(uuid(POOL)),
            format: Format::Qcow2,
            size_bytes: 1 << 30,
            base: None,
            owner: Some(VmId(uuid(n))),
            generation: Generation(1),
        }),
        Row::Operation(Box::new(operation(n, OperationState::Running))),
        order(n, 1),
        Row::Answer(answer(n)),
        notice(sequence),
    ]
}

/// A row of every kind; what the loaded world holds comes back in this order.
pub fn world() -> Vec<Row> {
    let mut rows = base();
    rows.extend(creation(0x100, 1));
    rows.push(Row::JoinToken(JoinToken {
        id: TokenId(uuid(7)),
        hash: TokenHash([1; 32]),
        expires_at: Timestamp(1_700_000_900_000),
        created_by: "admin".to_owned(),
    }));
    rows.push(Row::ApiToken(ApiToken {
        id: TokenId(uuid(8)),
        hash: TokenHash([2; 32]),
        actor: Actor {
            subject: "admin".to_owned(),
            project: project_id(),
            role: Role::CloudAdmin,
            via: Via::default(),
        },
        expires_at: None,
        name: None,
        kind: TokenKind::Service,
        owner: None,
        created_by: String::new(),
        created_at: None,
    }));
    rows
}

/// A row of every kind of schema 2.
pub fn world_v2() -> Vec<Row> {
    let mut rows = world();
    let at = Timestamp(1_700_000_000_000);
    rows.push(Row::User(Box::new(User {
        id: UserId(uuid(9)),
        name: name("alice"),
        password: PasswordHash("$argon2id$v=19$m=19456,t=2,p=1$c2FsdHNhbHQ$aGFzaA".to_owned()),
        cloud_admin: false,
        grants: [(project_id(), Role::Operator)].into(),
        disabled: false,
        created_at: at,
    })));
    rows.push(Row::ApiToken(ApiToken {
        id: TokenId(uuid(10)),
        hash: TokenHash([3; 32]),
        actor: Actor {
            subject: "alice/ci".to_owned(),
            project: project_id(),
            role: Role::Viewer,
            via: Via::default(),
        },
        expires_at: Some(Timestamp(1_800_000_000_000)),
        name: Some(name("ci")),
        kind: TokenKind::Service,
        owner: Some(UserId(uuid(9))),
        created_by: "alice".to_owned(),
        created_at: Some(at),
    }));
    rows.push(audit_entry(1, at, "alice"));
    rows
}

/// A row of every kind of schema 3.
pub fn world_v3() -> Vec<Row> {
    let mut rows = world_v2();
    rows.push(seed(0x100));
    rows
}

/// What the guest of a VM is told.
pub fn seed(n: u128) -> Row {
    Row::Seed(Box::new(SeedRow {
        vm: VmId(uuid(n)),
        seed: GuestSeed {
            hostname: "web1.example".to_owned(),
            ssh_keys: vec!["ssh-ed25519 AAAAC3Nz".to_owned()],
            user_data: Some(UserData::new("#cloud-config\npassword: hunter2\n".to_owned())),
        },
    }))
}

pub fn audit_entry(n: u128, at: Timestamp, subject: &str) -> Row {
    let actor = Actor {
        subject: subject.to_owned(),
        project: project_id(),
        role: Role::Operator,
        via: Via {
            user: Some(UserId(uuid(9))),
            token: None,
            remote: Some("192.0.2.7".parse().unwrap()),
        },
    };
    let result = AuditResult::Accepted { operation: None };
    let entry = AuditEntry::of(&actor, at, uuid(n), "vm.start", "web1".to_owned(), result);
    Row::Audit(Box::new(entry))
}

/// The part of rows that a loaded world holds, by key.
pub fn in_world(rows: &[Row]) -> Vec<Row> {
    let outside = |row: &Row| match row {
        Row::Answer(_) | Row::Notice(_) | Row::Audit(_) => true,
        Row::Operation(operation) => operation.state.is_over(),
        _ => false,
    };
    sorted(rows.iter().filter(|row| !outside(row)).cloned().collect())
}

pub fn sorted(mut rows: Vec<Row>) -> Vec<Row> {
    rows.sort_by_key(Row::key);
    rows
}

pub fn failed() -> OperationState {
    OperationState::Failed {
        reason: Refusal::new(model::Code::TimedOut, "timed out"),
    }
}
