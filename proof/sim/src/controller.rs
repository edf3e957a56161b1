//! The controller: the engine, a store in memory, sessions with the agents. As `control/controller` does it.

use std::{collections::BTreeSet, net::Ipv4Addr};

use engine::{Bootstrap, World, audit, step};
use model::{
    Actor, Change, Command, Digest, Effect, Epoch, Event, HostFacts, NetworkId, OperationKind, OperationState, Order,
    PoolId, ProjectId, Report, Request, RequestId, Role, Row, SubnetId, Timestamp, TokenId,
    access::{JoinToken, TokenHash},
    host::{Accelerator, Hypervisor, PoolFacts},
    layout::Family,
    storage::Format,
    template::{Blob, Boot, Content, Disk, Seed},
};
use uuid::Uuid;

use crate::{Checked, Happens, Sim};

const PROJECT: ProjectId = ProjectId(Uuid::from_u128(1));
const POOL: PoolId = PoolId(Uuid::from_u128(0x500));
const BEGAN_MS: i64 = 1_700_000_000_000;
/// Memory of each host, and how much of it is offered.
const MEMORY_MIB: u64 = 4096;
pub(crate) const OFFERED_MIB: u64 = MEMORY_MIB * 90 / 100;

impl Sim {
    /// A new cell's rows.
    pub(crate) fn found(&mut self) {
        let changes = World::bootstrap(&Bootstrap {
            project: PROJECT,
            network: NetworkId(Uuid::from_u128(2)),
            subnet: SubnetId(Uuid::from_u128(3)),
            address: Ipv4Addr::new(10, 91, 0, 0),
            prefix: 22,
            gateway: Some(Ipv4Addr::new(10, 91, 0, 1)),
            first: Ipv4Addr::new(10, 91, 0, 2),
            last: Ipv4Addr::new(10, 91, 3, 250),
            mtu: 1500,
            token: TokenId(Uuid::from_u128(4)),
            token_hash: TokenHash([7; 32]),
            subject: "admin".to_owned(),
        });
        changes.into_iter().for_each(|change| self.store(change));
    }

    /// The hosts join, their agents start, a template is made.
    pub(crate) fn begin(&mut self) -> Checked {
        self.controller_starts()?;
        for host in 0..self.hosts.len() {
            let id = TokenId(self.fresh_uuid());
            let expires_at = self.timestamp().after(model::Millis::seconds(3600));
            let created_by = "admin".to_owned();
            let token = JoinToken {
                id,
                hash: TokenHash([1; 32]),
                expires_at,
                created_by,
            };
            self.request(Command::AddJoinToken(token))?;
            let name = format!("h{host}").parse().map_err(|_| "a host's name is none")?;
            let host_id = self.hosts[host].id;
            self.request(Command::JoinHost {
                token: id,
                host: host_id,
                name,
            })?;
            self.agent_starts(host)?;
        }
        self.run_until(1_000)?;
        let name = "micro".parse().map_err(|_| "the template's name is none")?;
        self.request(Command::CreateTemplate {
            name,
            content: content(),
        })?;
        self.tick()
    }

    pub(crate) fn timestamp(&self) -> Timestamp {
        Timestamp(BEGAN_MS + i64::try_from(self.now).unwrap_or(i64::MAX))
    }

    fn fresh_uuid(&mut self) -> Uuid {
        self.ids += 1;
        Uuid::from_u128(self.ids)
    }

    /// A person asks; a controller that is away answers nothing.
    pub(crate) fn request(&mut self, command: Command) -> Checked {
        self.note(|| format!("asked: {command:?}"));
        let request = Request {
            id: RequestId(self.fresh_uuid()),
            actor: Actor {
                subject: "admin".to_owned(),
                project: PROJECT,
                role: Role::CloudAdmin,
                via: model::Via::default(),
            },
            command,
            key: None,
            expect: None,
            dry_run: false,
            fresh: (0..Request::FRESH).map(|_| self.fresh_uuid()).collect(),
        };
        self.decide(Event::Request(Box::new(request)))
    }

    fn store(&mut self, change: Change) {
        match change {
            Change::Put(row) => drop(self.rows.insert(row.key(), row)),
            Change::Delete(key) => drop(self.rows.remove(&key)),
        }
    }

    /// One event, one commit, then what is to be sent. The controller may die before the commit, or after it.
    pub(crate) fn decide(&mut self, event: Event) -> Checked {
        let now = self.timestamp();
        let Some(world) = self.world.as_mut() else {
            return Ok(());
        };
        let effects = step(world, event, now);
        audit::audit(world)?;
        audit::audit_step(&self.generations, world)?;
        self.generations = audit::generations(world);
        let dies = self.options.faults && !self.calm && self.chance.one_in(500);
        if dies && self.chance.one_in(2) {
            self.count("controller died before a commit");
            return self.controller_dies();
        }
        let mut sends = vec![];
        for effect in effects {
            match effect {
                Effect::Change(change) => {
                    self.see(&change);
                    self.store(*change);
                }
                Effect::Send(host, order) => sends.push((host, order)),
                Effect::Reply(_, answer) => self.note(|| match answer {
                    Ok(_) => "accepted".to_owned(),
                    Err(refusal) => format!("refused: {}", refusal.message),
                }),
                Effect::Progress(..) => {}
            }
        }
        if dies {
            self.count("controller died after a commit");
            return self.controller_dies();
        }
        for (host, order) in sends {
            if let Some(host) = self.host_index(host) {
                self.send_down(host, *order);
            }
        }
        Ok(())
    }

    /// Counts what ended, and tells of it.
    fn see(&mut self, change: &Change) {
        match change {
            Change::Put(Row::Operation(operation)) if operation.state.is_over() => {
                let moves = matches!(operation.kind, OperationKind::MigrateVm(_));
                let done = operation.state == OperationState::Succeeded;
                match (moves, done) {
                    (true, true) => self.outcome.moved += 1,
                    (true, false) => self.outcome.rolled_back += 1,
                    (false, true) => self.outcome.succeeded += 1,
                    (false, false) => self.outcome.failed += 1,
                }
                self.note(|| {
                    format!(
                        "  {} of {} is {:?}",
                        operation.kind.name(),
                        operation.target.name,
                        operation.state
                    )
                });
            }
            Change::Put(Row::Vm(vm)) => self.note(|| {
                let status = &vm.status;
                let host = status.host.map(|host| host.0.as_u128() - 0x100);
                format!(
                    "  {} is {} on {host:?} at {} (ordered {}, observed {}, moving {}, cleared {}) {:?}",
                    vm.name,
                    status.state,
                    status.generation,
                    status.ordered,
                    status.observed,
                    status.moving.is_some(),
                    status.cleared.len(),
                    status.reason,
                )
            }),
            Change::Put(Row::Notice(notice)) if notice.what == "host.report-ignored" => {
                self.note(|| format!("  ignored: {}", notice.detail));
            }
            _ => {}
        }
    }

    pub(crate) fn send_down(&mut self, host: usize, order: Order) {
        let delay = self.chance.between(1, 15);
        let now = self.now;
        let entry = &mut self.hosts[host];
        let Some(session) = entry.session else { return };
        entry.down_until = entry.down_until.max(now + delay);
        let (at, order) = (entry.down_until, Box::new(order));
        self.at(at, Happens::Down { host, session, order });
    }

    pub(crate) fn send_up(&mut self, host: usize, number: u64, report: Report) {
        let delay = self.chance.between(1, 15);
        let now = self.now;
        let entry = &mut self.hosts[host];
        let Some(session) = entry.session else { return };
        entry.up_until = entry.up_until.max(now + delay);
        let (at, report) = (entry.up_until, Box::new(report));
        self.at(
            at,
            Happens::Up {
                host,
                session,
                number,
                report,
            },
        );
    }

    pub(crate) fn down(&mut self, host: usize, session: u64, order: Order) -> Checked {
        if self.hosts[host].session == Some(session) {
            self.obey(host, order)
        } else {
            Ok(())
        }
    }

    /// A report arrives: once it is committed it is acknowledged. What comes twice is heard once.
    pub(crate) fn up(&mut self, host: usize, session: u64, number: u64, report: Report) -> Checked {
        let Some(agent) = self.hosts[host].agent else {
            return Ok(());
        };
        if self.hosts[host].session != Some(session) || self.world.is_none() {
            return Ok(());
        }
        let known = self
            .received
            .get(&host)
            .is_some_and(|&(of, last)| of == agent && number <= last);
        if !known {
            self.decide(Event::Report(self.hosts[host].id, Box::new(report)))?;
            if self.hosts[host].session != Some(session) {
                return Ok(());
            }
            self.received.insert(host, (agent, number));
        }
        self.after(1, 15, Happens::Ack { host, session, number });
        Ok(())
    }

    pub(crate) fn ack(&mut self, host: usize, session: u64, number: u64) -> Checked {
        let entry = &mut self.hosts[host];
        if entry.session == Some(session) {
            entry.reports.retain(|(of, _)| *of > number);
        }
        Ok(())
    }

    /// An agent tries to reach the controller.
    pub(crate) fn connects(&mut self, host: usize) -> Checked {
        let entry = &self.hosts[host];
        let (Some(agent), None) = (entry.agent, entry.session) else {
            return Ok(());
        };
        if !entry.reachable || self.world.is_none() {
            self.after(100, 3_000, Happens::Connects { host });
            return Ok(());
        }
        let session = self.fresh();
        let received = self
            .received
            .get(&host)
            .filter(|(of, _)| *of == agent)
            .map_or(0, |(_, last)| *last);
        let facts = self.facts(host);
        let vms = self.inventory(host);
        self.push_report(host, Report::Facts(Box::new(facts)));
        self.push_report(host, Report::Inventory { vms });
        self.hosts[host].session = Some(session);
        self.hosts[host].reports.retain(|(of, _)| *of > received);
        self.decide(Event::Connected(self.hosts[host].id))?;
        let waiting: Vec<_> = self.hosts[host].reports.iter().cloned().collect();
        for (number, report) in waiting {
            self.send_up(host, number, report);
        }
        let id = self.hosts[host].id;
        let orders: Vec<Order> = self.world.iter().flat_map(|world| world.outbox(id)).collect();
        for order in orders {
            self.send_down(host, order);
        }
        Ok(())
    }

    pub(crate) fn session_ends(&mut self, host: usize) -> Checked {
        if self.hosts[host].session.take().is_none() {
            return Ok(());
        }
        self.after(100, 3_000, Happens::Connects { host });
        self.decide(Event::Disconnected(self.hosts[host].id))
    }

    pub(crate) fn controller_dies(&mut self) -> Checked {
        self.world = None;
        self.received.clear();
        for host in 0..self.hosts.len() {
            self.session_ends(host)?;
        }
        self.after(200, 10_000, Happens::ControllerStarts);
        Ok(())
    }

    pub(crate) fn controller_starts(&mut self) -> Checked {
        if self.world.is_some() {
            return Ok(());
        }
        let mut world = World::load(self.rows.values().cloned().collect()).map_err(|error| error.to_string())?;
        self.epoch += 1;
        world.set_epoch(Epoch(self.epoch));
        self.generations = audit::generations(&world);
        self.world = Some(world);
        // Nobody is connected to a controller that has just begun.
        for host in 0..self.hosts.len() {
            self.decide(Event::Disconnected(self.hosts[host].id))?;
        }
        Ok(())
    }

    pub(crate) fn tick(&mut self) -> Checked {
        self.decide(Event::Tick)?;
        if self.chance.one_in(60)
            && let Some(world) = &self.world
        {
            let mut loaded = World::load(self.rows.values().cloned().collect()).map_err(|error| error.to_string())?;
            loaded.set_epoch(Epoch(self.epoch));
            if loaded != *world {
                return Err("the store's rows are another world than the engine's".to_owned());
            }
        }
        self.after(1_000, 1_000, Happens::Tick);
        Ok(())
    }

    fn facts(&self, host: usize) -> HostFacts {
        let machine = "pc-q35-10.0".to_owned();
        HostFacts {
            boot: self.hosts[host].boot_id(),
            address: Ipv4Addr::LOCALHOST.into(),
            peer_port: 7000,
            cpus: 8,
            memory_mib: MEMORY_MIB,
            hypervisor: Hypervisor {
                kind: "qemu".to_owned(),
                version: "10.0.2".to_owned(),
                accelerator: Accelerator::Kvm,
                accelerator_reason: "simulated".to_owned(),
                machines: [(Family::Q35, machine.clone())].into(),
                machine_types: BTreeSet::from([machine]),
                migration: BTreeSet::from(["return-path".to_owned()]),
            },
            pools: vec![PoolFacts {
                id: POOL,
                name: "shared".parse().expect("`shared` is a name"),
                capacity_bytes: 1 << 40,
                free_bytes: 1 << 39,
                silent_since: None,
            }],
            agent_version: "0.1.0".to_owned(),
        }
    }
}

fn content() -> Content {
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
