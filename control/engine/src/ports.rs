//! Ports: what they let through, told to the hosts that have them whenever it changes, and what the hosts answer.
//!
//! ```text
//!   port set, group's rules, a member comes or goes ──▶ renew ──▶ revision + 1 ──▶ Order::Port to each host that holds the VM
//!                                                                     └─ VM off: its next Start brings it all
//! ```

use std::collections::BTreeSet;

use model::{
    Code, HostId, Key, Order, Outcome, Port, PortId, PortPolicy, Refusal, Request, Row, SecurityGroupId, VmId,
    access::Actor,
    command::{LimitChange, PortChange},
    name::Reference,
    order::{PortOrder, PortReport, Subject},
    policy::{
        ALLOWED_MAX, Allowed, BURST_MAX, Cidr, Direction, Filter, GROUPS_OF_PORT_MAX, RATE_MAX, RATE_MIN, RateLimit,
        Remote,
    },
};

use crate::{
    definition, groups, hosts, index,
    request::{self, Decision, refuse},
    txn::Txn,
    world::World,
};

/// Most ports of a security group: each of them may have to be told of each other.
const PORTS_OF_GROUP_MAX: usize = 500;

/// The port that is meant, in the actor's project: by its id, or the VM that has no other.
pub(crate) fn find<'w>(world: &'w World, actor: &Actor, reference: &Reference) -> Result<&'w Port, Box<Refusal>> {
    let by_id = match reference {
        Reference::Id(id) => world.ports.get(&PortId(*id)),
        Reference::Name(_) => None,
    };
    if let Some(port) = by_id.filter(|port| port.project == actor.project && port.vm.is_some()) {
        return Ok(port);
    }
    let unknown = || {
        let message = format!("there is no port {reference} in this project, and no VM {reference}");
        refuse(Code::NotFound, message, "`godwit port list` shows what there is")
    };
    let vm = request::vm(world, actor, reference).map_err(|_| unknown())?;
    match vm.ports.as_slice() {
        [port] => world.ports.get(port).ok_or_else(unknown),
        ports => {
            let message = format!("VM {} has {} ports", vm.name, ports.len());
            Err(refuse(
                Code::InvalidInput,
                message,
                "give the id of one: `godwit port list`",
            ))
        }
    }
}

/// Changes what a port lets through.
pub(crate) fn set(txn: &mut Txn<'_>, request: &Request, reference: &Reference, change: &PortChange) -> Decision {
    let world = txn.world();
    let port = find(world, &request.actor, reference)?;
    let mut spec = port.spec.clone();
    if let Some(down) = change.link_down {
        spec.link_down = down;
    }
    if let Some(allowed) = &change.allow_addresses {
        spec.allowed = addresses(allowed)?;
    }
    if let Some(wanted) = &change.security_groups {
        spec.groups = groups_of(world, &request.actor, wanted, &port.spec.groups)?;
    }
    for (change, limit) in [
        (change.to_guest, &mut spec.to_guest),
        (change.from_guest, &mut spec.from_guest),
    ] {
        match change {
            Some(LimitChange::None) => *limit = None,
            Some(LimitChange::Limit(wanted)) => *limit = Some(bounded(wanted)?),
            None => {}
        }
    }
    if request.dry_run || spec == port.spec {
        return Ok(Outcome::Done);
    }
    let (id, moved): (_, BTreeSet<_>) = (
        port.id,
        port.spec.groups.symmetric_difference(&spec.groups).copied().collect(),
    );
    txn.edit_port(id, |port| port.spec = spec);
    let mut told = concerned_by(txn.world(), moved);
    told.insert(id);
    renew(txn, told);
    Ok(Outcome::Done)
}

/// Addresses beyond its own that a port may use.
pub(crate) fn addresses(wanted: &[Cidr]) -> Result<Vec<Cidr>, Box<Refusal>> {
    if wanted.len() > ALLOWED_MAX {
        let message = format!("{} ranges of addresses are too many for a port", wanted.len());
        return Err(refuse(Code::InvalidInput, message, "give at most 16, or wider ones"));
    }
    Ok(wanted.to_vec())
}

/// The groups that are meant, where there is room in those that are new.
pub(crate) fn groups_of(
    world: &World,
    actor: &Actor,
    wanted: &[Reference],
    present: &BTreeSet<SecurityGroupId>,
) -> Result<BTreeSet<SecurityGroupId>, Box<Refusal>> {
    let found = wanted
        .iter()
        .map(|group| groups::find(world, actor, group).map(|group| group.id));
    let found: BTreeSet<_> = found.collect::<Result<_, _>>()?;
    if found.len() > GROUPS_OF_PORT_MAX {
        let message = format!("{} security groups are too many for a port", found.len());
        return Err(refuse(Code::InvalidInput, message, "give at most 8"));
    }
    let full = found
        .difference(present)
        .find(|group| world.index.ports_in(**group).take(PORTS_OF_GROUP_MAX).count() == PORTS_OF_GROUP_MAX);
    if let Some(group) = full.and_then(|group| world.security_groups.get(group)) {
        let message = format!(
            "security group {} has {PORTS_OF_GROUP_MAX} ports, which is as many as it takes",
            group.name
        );
        return Err(refuse(Code::NoCapacity, message, "make another with the same rules"));
    }
    Ok(found)
}

fn bounded(limit: RateLimit) -> Result<RateLimit, Box<Refusal>> {
    if !(RATE_MIN..=RATE_MAX).contains(&limit.bytes_per_s) {
        let message = format!("a limit of {} bytes/s is not possible", limit.bytes_per_s);
        return Err(refuse(Code::InvalidInput, message, "give 16000 to 12500000000"));
    }
    if limit.burst_bytes.is_some_and(|burst| burst > BURST_MAX) {
        let message = format!(
            "a burst of {} bytes is not possible",
            limit.burst_bytes.unwrap_or_default()
        );
        return Err(refuse(Code::InvalidInput, message, "give at most 1 GiB"));
    }
    Ok(limit)
}

/// Ports whose rules speak of the ports of these groups.
pub(crate) fn concerned_by(world: &World, groups: impl IntoIterator<Item = SecurityGroupId>) -> BTreeSet<PortId> {
    let index = &world.index;
    let naming = groups.into_iter().flat_map(|group| index.groups_that_name(group));
    let naming: BTreeSet<_> = naming.collect();
    naming.into_iter().flat_map(|group| index.ports_in(group)).collect()
}

/// What these ports let through may have changed: hosts that have them are told.
pub(crate) fn renew(txn: &mut Txn<'_>, ports: impl IntoIterator<Item = PortId>) {
    for id in ports {
        txn.edit_port(id, |port| port.spec.revision = port.spec.revision.next());
        let world = txn.world();
        let Some(vm) = world.ports.get(&id).and_then(|port| world.vm(port.vm?)) else {
            continue;
        };
        let Some(port) = definition::port(world, id) else {
            continue;
        };
        let (vm, hosts, epoch) = (vm.id, index::holders(vm), world.transient.epoch);
        for host in hosts {
            let port = port.clone();
            txn.send_kept(host, Order::Port(Box::new(PortOrder { epoch, vm, port })));
        }
    }
}

/// What a host enforces at a port.
pub(crate) fn policy(world: &World, port: &Port) -> PortPolicy {
    let spec = &port.spec;
    PortPolicy {
        revision: spec.revision,
        link_down: spec.link_down,
        allowed: spec.allowed.clone(),
        filter: (!spec.groups.is_empty()).then(|| filter(world, &spec.groups)),
        to_guest: spec.to_guest,
        from_guest: spec.from_guest,
        floor: spec.floor,
    }
}

/// All that these groups allow, each once.
fn filter(world: &World, groups: &BTreeSet<SecurityGroupId>) -> Filter {
    let rows = groups.iter().filter_map(|group| world.security_groups.get(group));
    let (mut ingress, mut egress) = (BTreeSet::new(), BTreeSet::new());
    for rule in rows.flat_map(|group| &group.rules) {
        let allowed = Allowed {
            protocol: rule.protocol,
            ports: rule.ports,
            remote: match rule.remote {
                Remote::Any => None,
                Remote::Cidr(range) => Some(vec![range]),
                Remote::Group(group) => Some(members(world, group)),
            },
        };
        match rule.direction {
            Direction::Ingress => ingress.insert(allowed),
            Direction::Egress => egress.insert(allowed),
        };
    }
    Filter {
        ingress: ingress.into_iter().collect(),
        egress: egress.into_iter().collect(),
    }
}

/// The addresses of a group's ports.
fn members(world: &World, group: SecurityGroupId) -> Vec<Cidr> {
    let ports = world.index.ports_in(group).filter_map(|id| world.ports.get(&id));
    let both = |port: &Port| [Some(port.ip.into()), port.v6.map(Into::into)].into_iter().flatten();
    let addresses: BTreeSet<Cidr> = ports.flat_map(both).map(Cidr::one).collect();
    addresses.into_iter().collect()
}

/// A VM's port is no more: nothing waits for it, and others hear that its address is not in its groups any more.
pub(crate) fn release(txn: &mut Txn<'_>, vm: VmId, id: PortId) {
    let Some(port) = txn.world().ports.get(&id) else { return };
    let groups = port.spec.groups.clone();
    let hosts = txn.world().vm(vm).map(index::concerned).unwrap_or_default();
    txn.edit_port(id, |port| {
        *port.spec = model::PortSpec {
            revision: port.spec.revision,
            ..model::PortSpec::default()
        };
    });
    for host in hosts {
        txn.delete(Key::Outbox(host, Subject::Port(id)));
    }
    let told = concerned_by(txn.world(), groups);
    renew(txn, told);
}

/// A host has set what a port lets through, or says why it could not.
pub(crate) fn report(txn: &mut Txn<'_>, host: HostId, report: &PortReport) {
    let key = (host, Subject::Port(report.port));
    let waiting = txn.world().outbox.get(&key).map(|row| &row.order);
    let answered = matches!(waiting, Some(Order::Port(order)) if order.port.policy.revision <= report.revision);
    if !answered {
        return;
    }
    if let Some(reason) = &report.refused {
        // It stays in the outbox: it is told again when the host connects anew.
        return hosts::complain(txn, host, format!("port {}: {}", report.port, reason.message));
    }
    txn.delete(Key::Outbox(host, Subject::Port(report.port)));
    txn.edit_port(report.port, |port| port.applied = port.applied.max(report.revision));
}

/// Whether a host has yet to set what a port lets through.
pub(crate) fn is_pending(world: &World, port: &Port) -> bool {
    let hosts = port
        .vm
        .and_then(|vm| world.vm(vm))
        .map(index::holders)
        .unwrap_or_default();
    let mut keys = hosts.into_iter().map(|host| (host, Subject::Port(port.id)));
    keys.any(|key| world.outbox.contains_key(&key))
}

/// The group's rows as they are put: for [`groups`].
pub(crate) fn put_group(txn: &mut Txn<'_>, group: model::SecurityGroup) {
    let id = group.id;
    txn.put(Row::SecurityGroup(Box::new(group)));
    let told: Vec<PortId> = txn.world().index.ports_in(id).collect();
    renew(txn, told);
}
