//! A host that is dead for good: a person says that its machine is off and stays off, and what was on it is settled without it.
//!
//! ```text
//!   lost ──▶ abandoned ─▶ each VM: as after a reboot that nobody will ever report
//!                           held there     ─▶ failed, on no host, under a generation that nobody ever had
//!                           moving from it ─▶ the destination has it, or declines
//!                           moving to it   ─▶ the source keeps it, or has released it and clears away
//! ```
//! Until then nothing of it is started elsewhere: it may well run. What the person says stands for the fence that does not exist yet.

use model::{
    Code, HostId, Key, OperationId, OperationKind, Outcome, Refusal, Request, Stage, Vm, VmId, host::Link,
    name::Reference, operation::TargetKind,
};

use crate::{
    hosts, reconcile, reports,
    request::{self, Decision, Fresh, refuse},
    stranded, templates,
    txn::{Txn, target},
    world::World,
};

/// Removes a lost host with whatever was on it.
pub(crate) fn host(txn: &mut Txn<'_>, request: &Request, reference: &Reference) -> Decision {
    let world = txn.world();
    let row = request::host(world, reference)?.clone();
    if row.status.link == Link::Up {
        let message = format!("host {} is connected: its machine is not off", row.name);
        let hint =
            "move or delete its VMs, then remove it without force; or switch the machine off and wait until it is lost";
        return Err(refuse(Code::WrongState, message, hint));
    }
    if request.dry_run {
        return Ok(Outcome::Done);
    }
    let id = Fresh::of(request).operation(world)?;
    let vms: Vec<VmId> = world.index.vms_on(row.id).collect();
    templates::abandon(txn, row.id);
    // Nothing that it was told will be done.
    let orders = txn.world().outbox.range((row.id, crate::subject_min())..);
    let orders = orders.take_while(|((of, _), _)| *of == row.id);
    let orders: Vec<Key> = orders.map(|((of, subject), _)| Key::Outbox(*of, *subject)).collect();
    orders.into_iter().for_each(|key| txn.delete(key));
    hosts::see_pools(txn, row.id, &[]);
    for &vm in &vms {
        settle(txn, row.id, vm);
    }
    let detail = "its machine was said to be off for good".to_owned();
    txn.notice_host(row.id, "host.removed", detail);
    txn.delete(Key::Host(row.id));
    for vm in vms {
        stranded::begin(txn, vm);
    }
    let target = target(TargetKind::Host, row.id.0, &row.name);
    request::done(txn, request, id, OperationKind::RemoveHost, target)
}

/// What becomes of a VM that concerns the host.
fn settle(txn: &mut Txn<'_>, host: HostId, vm: VmId) {
    let held = |vm: &Vm| vm.status.host == Some(host) && vm.status.state.holds_capacity();
    let was_held = txn.world().vm(vm).is_some_and(held);
    reports::host_rebooted(txn, host, vm);
    let name = crate::lifecycle::host_name(txn.world(), host);
    if txn.world().vm(vm).is_some_and(|vm| vm.status.host == Some(host)) {
        leave(txn, vm, &name, was_held);
    }
    // Of a move whose end only this host could have told, the other one is asked now.
    let open = txn.holding(vm).and_then(|held| {
        let migration = held.migration()?;
        let concerns = [migration.terms.source, migration.terms.destination].contains(&host);
        (concerns && migration.stage >= Stage::Commitment).then_some(held.id)
    });
    if let Some(operation) = open {
        fail(txn, operation, vm, &name);
    }
    reconcile::settle_terms(txn, vm);
}

/// Takes a VM off the host that held it, or held it last.
fn leave(txn: &mut Txn<'_>, vm: VmId, name: &str, was_held: bool) {
    let waiting = txn.holding(vm).filter(|held| held.migration().is_none());
    if let Some(operation) = waiting.map(|held| held.id) {
        fail(txn, operation, vm, name);
    }
    let world = txn.world();
    let Some(row) = world.vm(vm) else { return };
    let settled = row.status.moving.is_none();
    let gone = !disks_survive(world, row);
    let text = match (was_held, gone) {
        (_, true) => format!("its host {name} was removed, and nobody else sees its disks; delete it"),
        (true, false) => format!("its host {name} was removed with what it held in memory; start it anew"),
        (false, false) => format!("its host {name} was removed"),
    };
    let (ports, volumes) = (row.ports.clone(), row.volumes.clone());
    txn.edit_vm(vm, |vm| {
        let status = &mut vm.status;
        status.host = None;
        status.reason = Some(text);
        if settled {
            if was_held || gone {
                status.state = model::VmState::Failed;
            }
            // Above everything that was ever given: should it come back, what it has is a leftover.
            status.highest = status.highest.next();
            status.generation = status.highest;
        }
    });
    let generation = txn.world().vm(vm).map(|vm| vm.status.generation).unwrap_or_default();
    for port in ports {
        txn.edit_port(port, |port| port.bound = None);
    }
    for volume in volumes {
        txn.edit_volume(volume, |volume| volume.generation = generation);
    }
}

/// Whether each of a VM's disks is seen by some host.
fn disks_survive(world: &World, vm: &Vm) -> bool {
    let pools = vm
        .volumes
        .iter()
        .filter_map(|id| world.volumes.get(id))
        .map(|row| row.pool);
    pools
        .into_iter()
        .all(|id| world.pools.get(&id).is_some_and(|pool| !pool.hosts.is_empty()))
}

fn fail(txn: &mut Txn<'_>, operation: OperationId, vm: VmId, host: &str) {
    let world = txn.world();
    let name = world.vm(vm).map_or_else(|| vm.to_string(), |vm| vm.name.to_string());
    let kind = world.operation(operation).map_or("operation", |held| held.kind.name());
    let message = format!("{kind} of VM {name}: host {host} was removed meanwhile");
    let hint = format!("look at it: `godwit vm show {name}`, then ask again");
    txn.fail(operation, Refusal::new(Code::HostUnreachable, message).hint(hint));
}
