//! A cell for tests: a world with a follower that applies every change, and what tests say to it.
#![allow(dead_code, reason = "each test binary uses its part of it")]

use std::{collections::BTreeMap, net::Ipv4Addr};

use engine::{Bootstrap, World, audit, step};
use model::{
    Actor, BootId, Change, Command, Digest, Effect, Epoch, Event, Generation, HostFacts, HostId, Name, NetworkId,
    Operation, Order, Outcome, PoolId, ProjectId, Refusal, Report, Request, RequestId, Revision, Role, Row, SubnetId,
    Timestamp, TokenId, Vm, VmId,
    access::{JoinToken, TokenHash},
    command::{CreateVm, IdempotencyKey},
    host::{Accelerator, Hypervisor, PoolFacts},
    layout::Family,
    name::Reference,
    order::{Happening, TemplateReport, Verb, VmObserved, VmOrder, VmReport},
    storage::Format,
    template::{Blob, Boot, Content, Disk, Seed},
};
use uuid::Uuid;

pub(crate) const PROJECT: ProjectId = ProjectId(Uuid::from_u128(1));
pub(crate) const SHARED: PoolId = PoolId(Uuid::from_u128(0x500));

pub(crate) struct Cell {
    pub(crate) world: World,
    pub(crate) follower: World,
    pub(crate) now: Timestamp,
    pub(crate) sent: Vec<(HostId, Order)>,
    pub(crate) changes: usize,
    ids: u128,
    requests: u128,
    before: BTreeMap<VmId, (Generation, Option<HostId>)>,
}

pub(crate) fn host(n: u128) -> HostId {
    HostId(Uuid::from_u128(0x100 + n))
}

pub(crate) fn boot(n: u128) -> BootId {
    BootId(Uuid::from_u128(0xb00_000 + n))
}

pub(crate) fn name(text: &str) -> Name {
    text.parse().unwrap()
}

pub(crate) fn by_name(text: &str) -> Reference {
    text.parse().unwrap()
}

/// A person's wish to move a VM anywhere.
pub(crate) fn migrate(vm: &str) -> Command {
    Command::MigrateVm {
        vm: by_name(vm),
        to: None,
    }
}

/// A VM under way from its host to another, with the orders that both got.
pub(crate) fn moving(cell: &mut Cell) -> (HostId, HostId, VmOrder, VmOrder) {
    let source = cell.running("web1");
    cell.ask(migrate("web1")).unwrap();
    let (destination, receive) = cell.last_order();
    assert!(matches!(receive.verb, Verb::Receive { .. }));
    cell.answer(destination, &receive, Happening::Receiving { tunnel_port: 9 });
    let (at, send) = cell.last_order();
    assert!(at == source && matches!(send.verb, Verb::Send { .. }));
    (source, destination, receive, send)
}

pub(crate) fn admin() -> Actor {
    Actor {
        subject: "admin".to_owned(),
        project: PROJECT,
        role: Role::CloudAdmin,
        via: model::Via::default(),
    }
}

pub(crate) fn facts(boot: BootId, pools: &[(PoolId, &str)]) -> HostFacts {
    let machine = "pc-q35-7.2".to_owned();
    HostFacts {
        boot,
        address: "192.0.2.1".parse().unwrap(),
        peer_port: 7000,
        cpus: 4,
        memory_mib: 4096,
        hypervisor: Hypervisor {
            kind: "qemu".to_owned(),
            version: "7.2.0".to_owned(),
            accelerator: Accelerator::Tcg,
            accelerator_reason: "no KVM".to_owned(),
            machines: [(Family::Q35, machine.clone())].into(),
            machine_types: [machine].into(),
            migration: ["return-path".to_owned()].into(),
        },
        pools: pools
            .iter()
            .map(|(id, pool)| PoolFacts {
                id: *id,
                name: name(pool),
                capacity_bytes: 1 << 40,
                free_bytes: 1 << 39,
                silent_since: None,
            })
            .collect(),
        agent_version: "0.1.0".to_owned(),
    }
}

/// An inventory of one VM.
pub(crate) fn inventory(vm: VmId, generation: Generation, revision: Revision, what: Happening) -> Report {
    let vms = vec![VmObserved {
        vm,
        generation,
        revision,
        what,
    }];
    Report::Inventory { vms }
}

pub(crate) fn content() -> Content {
    let blob = |n: u8| Blob {
        digest: Digest([n; 32]),
        size_bytes: 1 << 20,
    };
    Content {
        boot: Boot::Direct {
            kernel: blob(1),
            initrd: blob(2),
            cmdline: "console=ttyS0".to_owned(),
        },
        disk: Some(Disk {
            blob: blob(3),
            format: Format::Qcow2,
            size_bytes: 1 << 30,
        }),
        memory_mib_min: 64,
        seed: Seed::None,
    }
}

pub(crate) fn wanted(vm: &str) -> CreateVm {
    CreateVm {
        name: name(vm),
        template: by_name("micro"),
        vcpus: 1,
        memory_mib: 512,
        disk_bytes: None,
        family: Family::Q35,
        network: None,
        host: None,
        pool: None,
        start: true,
        hostname: None,
        ssh_keys: vec![],
        user_data: None,
        security_groups: vec![],
        allow_addresses: vec![],
    }
}

impl Cell {
    pub(crate) fn empty() -> Self {
        let changes = World::bootstrap(&Bootstrap {
            project: PROJECT,
            network: NetworkId(Uuid::from_u128(2)),
            subnet: SubnetId(Uuid::from_u128(3)),
            address: Ipv4Addr::new(10, 91, 0, 0),
            prefix: 24,
            gateway: Some(Ipv4Addr::new(10, 91, 0, 1)),
            first: Ipv4Addr::new(10, 91, 0, 0),
            last: Ipv4Addr::new(10, 91, 0, 255),
            mtu: 1500,
            token: TokenId(Uuid::from_u128(4)),
            token_hash: TokenHash([7; 32]),
            subject: "admin".to_owned(),
        });
        let rows: Vec<Row> = changes
            .into_iter()
            .map(|change| match change {
                Change::Put(row) => row,
                Change::Delete(key) => unreachable!("a new cell deletes nothing: {key:?}"),
            })
            .collect();
        let mut world = World::load(rows).unwrap();
        world.set_epoch(Epoch(1));
        Self {
            follower: world.clone(),
            world,
            now: Timestamp(1_000_000),
            sent: Vec::new(),
            changes: 0,
            ids: 0x1000,
            requests: 0,
            before: BTreeMap::new(),
        }
    }

    /// A cell with `n` connected hosts on one shared pool, and the template `micro`.
    pub(crate) fn of(n: u128) -> Self {
        let mut cell = Self::empty();
        for i in 1..=n {
            cell.join(i);
            cell.connect(i, boot(i));
        }
        let content = content();
        let micro = name("micro");
        cell.ask(Command::CreateTemplate { name: micro, content }).unwrap();
        let (at, Order::Template(order)) = cell.sent.pop().unwrap() else {
            panic!("no fetch")
        };
        cell.report(
            at,
            Report::Template(TemplateReport {
                operation: order.operation,
                template: order.template,
                pool: order.pool,
                content: None,
                refused: None,
            }),
        );
        cell
    }

    pub(crate) fn join(&mut self, n: u128) {
        let token = JoinToken {
            id: TokenId(self.fresh_id()),
            hash: TokenHash([1; 32]),
            expires_at: Timestamp(self.now.0 + 3_600_000),
            created_by: "admin".to_owned(),
        };
        let id = token.id;
        self.ask(Command::AddJoinToken(token)).unwrap();
        let wish = name(&format!("h{n}"));
        let join = Command::JoinHost {
            token: id,
            host: host(n),
            name: wish,
        };
        self.ask(join).unwrap();
    }

    pub(crate) fn connect(&mut self, n: u128, boot: BootId) {
        self.event(Event::Connected(host(n)));
        self.report(host(n), Report::Facts(Box::new(facts(boot, &[(SHARED, "shared")]))));
    }

    fn fresh_id(&mut self) -> Uuid {
        self.ids += 1;
        // The random tail of an id becomes part of the Ethernet address.
        Uuid::from_u128(self.ids)
    }

    /// Takes a step, applies its changes to the follower, and checks every invariant.
    pub(crate) fn event(&mut self, event: Event) -> Vec<Effect> {
        let effects = step(&mut self.world, event, self.now);
        for effect in &effects {
            match effect {
                Effect::Change(change) => {
                    self.changes += 1;
                    self.follower.apply((**change).clone());
                }
                Effect::Send(host, order) => self.sent.push((*host, (**order).clone())),
                Effect::Reply(..) | Effect::Progress(..) => {}
            }
        }
        audit::audit(&self.world).unwrap();
        audit::audit_step(&self.before, &self.world).unwrap();
        self.before = audit::generations(&self.world);
        effects
    }

    pub(crate) fn ask(&mut self, command: Command) -> Result<Outcome, Refusal> {
        let request = self.request(command);
        self.submit(request)
    }

    pub(crate) fn request(&mut self, command: Command) -> Request {
        self.requests += 1;
        Request {
            id: RequestId(Uuid::from_u128(self.requests)),
            actor: admin(),
            command,
            key: None,
            expect: None,
            dry_run: false,
            fresh: (0..Request::FRESH).map(|_| self.fresh_id()).collect(),
        }
    }

    pub(crate) fn submit(&mut self, request: Request) -> Result<Outcome, Refusal> {
        let (id, dry) = (request.id, request.dry_run);
        let effects = self.event(Event::Request(Box::new(request)));
        let refused = effects.iter().any(|effect| matches!(effect, Effect::Reply(_, Err(_))));
        let is_audit = |effect: &Effect| matches!(effect, Effect::Change(change) if matches!(**change, model::Change::Put(model::Row::Audit(_))));
        let changed = effects
            .iter()
            .any(|effect| matches!(effect, Effect::Change(_) | Effect::Send(..)) && !is_audit(effect));
        assert!(!(refused && changed), "a refused request changes nothing");
        let audited = effects.iter().filter(|effect| is_audit(effect)).count();
        assert!(audited <= 1, "a request is audited once");
        assert!(audited == 1 || !refused || dry, "a refusal is audited");
        let mut replies = effects.into_iter().filter_map(|effect| match effect {
            Effect::Reply(to, answer) => Some((to, answer)),
            _ => None,
        });
        let (to, answer) = replies.next().expect("a request is answered");
        assert!(to == id && replies.next().is_none(), "a request is answered once");
        answer.map(|outcome| *outcome).map_err(|refusal| *refusal)
    }

    pub(crate) fn operate(&mut self, command: Command) -> Operation {
        match self.ask(command).unwrap() {
            Outcome::Operation(operation) => *operation,
            other => panic!("no operation but {other:?}"),
        }
    }

    pub(crate) fn keyed(&mut self, command: Command, key: &str, hash: u8) -> Result<Outcome, Refusal> {
        let mut request = self.request(command);
        request.key = Some(IdempotencyKey {
            key: key.to_owned(),
            body_hash: [hash; 32],
        });
        self.submit(request)
    }

    pub(crate) fn report(&mut self, host: HostId, report: Report) {
        self.event(Event::Report(host, Box::new(report)));
    }

    /// A host answers an order.
    pub(crate) fn answer(&mut self, host: HostId, order: &VmOrder, what: Happening) {
        let report = VmReport {
            vm: order.vm,
            generation: order.generation,
            revision: order.revision,
            operation: Some(order.operation),
            what,
        };
        self.report(host, Report::Vm(Box::new(report)));
    }

    /// The newest order about a VM that was sent, and to whom.
    pub(crate) fn last_order(&self) -> (HostId, VmOrder) {
        let orders = self.sent.iter().rev().filter_map(|(host, order)| match order {
            Order::Vm(order) => Some((*host, (**order).clone())),
            _ => None,
        });
        orders.take(1).next().expect("an order was sent")
    }

    /// Makes a VM that runs, and says where.
    pub(crate) fn running(&mut self, vm: &str) -> HostId {
        self.ask(Command::CreateVm(wanted(vm))).unwrap();
        let (at, order) = self.last_order();
        self.answer(at, &order, Happening::Running);
        at
    }

    pub(crate) fn vm(&self, of: &str) -> Vm {
        let vm = self.world.vms().find(|vm| vm.name.as_str() == of);
        vm.unwrap_or_else(|| panic!("no VM {of}")).clone()
    }

    pub(crate) fn tick(&mut self, seconds: i64) {
        self.now = Timestamp(self.now.0 + seconds * 1000);
        self.event(Event::Tick);
    }

    pub(crate) fn revision(&self, of: &str) -> Revision {
        self.vm(of).revision
    }
}
