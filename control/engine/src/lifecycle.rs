//! The verbs of a VM's life: each legal only in the states that [`model::Command`] names, each done at once when there is nothing
//! to do, else one operation and one order.

use std::collections::BTreeSet;

use model::{
    Code, Generation, HostId, Key, Millis, OperationId, OperationKind, OperationState, Outcome, Refusal, Request, Row,
    Vm, VmId, VmState, access::Usage, host::Link, name::Reference, order::Verb, vm::Power,
};

use crate::{
    create, definition, hosts,
    placement::{self, Need},
    ports, projects, reports,
    request::{self, Decision, Fresh, refuse},
    txn::Txn,
    world::World,
};

/// How long a start may take.
const START_MAX: Millis = Millis::seconds(180);
/// How long a stop may take beyond the grace.
const STOP_MARGIN: Millis = Millis::seconds(60);
/// Longest grace.
const GRACE_MAX: Millis = Millis::seconds(3600);
/// How long a kill, reboot, pause or resume may take.
const QUICK_MAX: Millis = Millis::seconds(60);
/// How long deleting may take.
const DELETE_MAX: Millis = Millis::seconds(180);
/// How long the address of a deleted VM rests: others may still have it in their tables.
pub(crate) const ADDRESS_RESTS: Millis = Millis::seconds(60);

/// Starts a VM that is off, where it was if that will do.
pub(crate) fn start(txn: &mut Txn<'_>, request: &Request, reference: &Reference) -> Decision {
    let world = txn.world();
    let vm = request::current_vm(world, request, reference)?;
    request::free(world, vm)?;
    match vm.status.state {
        VmState::Active => {
            // Of a lost host nobody knows whether it still runs.
            reachable(world, vm)?;
            return already(txn, request, vm.id, OperationKind::StartVm);
        }
        VmState::Inactive | VmState::Failed | VmState::Migrating => cold(world, vm)?,
        VmState::Paused => {
            return Err(wrong(
                vm,
                "start",
                &format!("resume it: `godwit vm resume {}`", vm.name),
            ));
        }
        VmState::Provisioning | VmState::Suspended => {
            return Err(wrong(vm, "start", "wait until its host has answered, then start it"));
        }
    }
    if vm
        .status
        .host
        .is_some_and(|host| reports::deletion(world, host, vm.id).is_some())
    {
        let hint = "its host has not yet answered the order to delete it; delete it again, or wait";
        return Err(wrong(vm, "start", hint));
    }
    let need = Need::of(world, vm);
    let plan = placement::plan(world, &need, None, |_| Vec::new());
    let stay = vm.status.host.filter(|host| {
        let verdict = plan.hosts.iter().find(|verdict| verdict.host == *host);
        verdict.is_some_and(|verdict| verdict.refused.is_empty())
    });
    if request.dry_run {
        return Ok(Outcome::Plan(plan));
    }
    let host = match stay {
        Some(host) => host,
        None => placement::chosen(&plan, &need, Code::NoCapacity)?,
    };
    let (id, before) = (vm.id, vm.status.host);
    let operation = begin(txn, request, id, OperationKind::StartVm, START_MAX, Some(Power::On))?;
    if let Some(before) = before.filter(|before| *before != host) {
        txn.withdraw(before, id);
    }
    create::place(txn, id, host);
    create::order_start(txn, id, host, operation);
    request::outcome(txn, operation)
}

/// Asks the guest to power off, then makes it.
pub(crate) fn stop(txn: &mut Txn<'_>, request: &Request, reference: &Reference, grace: Millis) -> Decision {
    let world = txn.world();
    let vm = request::current_vm(world, request, reference)?;
    if grace > GRACE_MAX {
        let message = format!("VM {}: a grace of {grace} is too long", vm.name);
        return Err(refuse(Code::InvalidInput, message, "give at most an hour"));
    }
    request::free(world, vm)?;
    match vm.status.state {
        VmState::Active | VmState::Paused => {}
        VmState::Inactive => return already(txn, request, vm.id, OperationKind::StopVm),
        VmState::Failed if vm.status.moving.is_none() => return already(txn, request, vm.id, OperationKind::StopVm),
        _ => {
            return Err(wrong(
                vm,
                "stop",
                &format!("end it at once: `godwit vm kill {}`", vm.name),
            ));
        }
    }
    let allowed = Millis(grace.0 + STOP_MARGIN.0);
    tell(
        txn,
        request,
        vm.id,
        OperationKind::StopVm,
        allowed,
        Some(Power::Off),
        Verb::Stop { grace },
    )
}

/// Ends a VM at once, whatever is being done to it, unless it moves or goes away.
pub(crate) fn kill(txn: &mut Txn<'_>, request: &Request, reference: &Reference) -> Decision {
    let world = txn.world();
    let vm = request::current_vm(world, request, reference)?;
    let held = vm
        .operation
        .and_then(|id| world.operation(id))
        .filter(|held| !held.state.is_over());
    // What is under way on one host has no point any more; a move concerns two.
    let superseded = held.filter(|held| {
        !matches!(
            held.kind,
            OperationKind::MigrateVm(_) | OperationKind::DeleteVm | OperationKind::KillVm
        )
    });
    if superseded.is_none() {
        request::free(world, vm)?;
    }
    match vm.status.state {
        VmState::Provisioning | VmState::Active | VmState::Paused => {}
        // Nobody has said how its move ended. Its source ends it where it has not given it up, and refuses where it has.
        VmState::Migrating => {}
        VmState::Inactive => return already(txn, request, vm.id, OperationKind::KillVm),
        VmState::Failed if vm.status.moving.is_none() => return already(txn, request, vm.id, OperationKind::KillVm),
        _ => {
            return Err(wrong(
                vm,
                "kill",
                "wait until the hosts of its move have said who has it",
            ));
        }
    }
    reachable(world, vm)?;
    if request.dry_run {
        return request::stays(world, vm);
    }
    let (id, superseded) = (vm.id, superseded.map(|held| held.id));
    // Nothing can be refused any more once the other operation is over.
    Fresh::of(request).operation(world)?;
    if let Some(superseded) = superseded {
        txn.finish(superseded, OperationState::Cancelled);
    }
    tell(
        txn,
        request,
        id,
        OperationKind::KillVm,
        QUICK_MAX,
        Some(Power::Off),
        Verb::Kill,
    )
}

/// Resets a VM.
pub(crate) fn reboot(txn: &mut Txn<'_>, request: &Request, reference: &Reference) -> Decision {
    let world = txn.world();
    let vm = request::current_vm(world, request, reference)?;
    request::free(world, vm)?;
    if vm.status.state != VmState::Active {
        return Err(wrong(
            vm,
            "reboot",
            "only an active VM can be reset; start or resume it",
        ));
    }
    tell(
        txn,
        request,
        vm.id,
        OperationKind::RebootVm,
        QUICK_MAX,
        None,
        Verb::Reboot,
    )
}

/// Makes a VM stand.
pub(crate) fn pause(txn: &mut Txn<'_>, request: &Request, reference: &Reference) -> Decision {
    let world = txn.world();
    let vm = request::current_vm(world, request, reference)?;
    request::free(world, vm)?;
    match vm.status.state {
        VmState::Active => {}
        VmState::Paused => return already(txn, request, vm.id, OperationKind::PauseVm),
        _ => return Err(wrong(vm, "pause", "only an active VM can be paused; start it")),
    }
    let power = Some(Power::Paused);
    tell(
        txn,
        request,
        vm.id,
        OperationKind::PauseVm,
        QUICK_MAX,
        power,
        Verb::Pause,
    )
}

/// Lets a VM run again.
pub(crate) fn resume(txn: &mut Txn<'_>, request: &Request, reference: &Reference) -> Decision {
    let world = txn.world();
    let vm = request::current_vm(world, request, reference)?;
    request::free(world, vm)?;
    match vm.status.state {
        VmState::Paused => {}
        VmState::Active => return already(txn, request, vm.id, OperationKind::ResumeVm),
        _ => return Err(wrong(vm, "resume", "only a paused VM can be resumed; start it")),
    }
    let power = Some(Power::On);
    tell(
        txn,
        request,
        vm.id,
        OperationKind::ResumeVm,
        QUICK_MAX,
        power,
        Verb::Resume,
    )
}

/// Deletes a VM with its disks; at once when it never was on a host.
pub(crate) fn delete(txn: &mut Txn<'_>, request: &Request, reference: &Reference) -> Decision {
    let world = txn.world();
    let vm = request::current_vm(world, request, reference)?;
    request::free(world, vm)?;
    if matches!(vm.status.state, VmState::Failed | VmState::Migrating) {
        cold(world, vm)?;
    }
    let host = remover(world, vm)?;
    if request.dry_run {
        return request::stays(world, vm);
    }
    let id = vm.id;
    let Some(host) = host else {
        let (operation, target) = (Fresh::of(request).operation(world)?, request::vm_target(vm));
        erase(txn, id);
        return request::done(txn, request, operation, OperationKind::DeleteVm, target);
    };
    let sees = |pool| world.pools.get(&pool).is_some_and(|pool| pool.hosts.contains(&host));
    let mut volumes = definition::places(world, vm);
    let moved = vm.status.host != Some(host);
    if moved {
        volumes.retain(|place| sees(place.pool));
    }
    let operation = begin(txn, request, id, OperationKind::DeleteVm, DELETE_MAX, Some(Power::Off))?;
    if moved {
        txn.edit_vm(id, |vm| {
            vm.status.host = Some(host);
            vm.status.highest = vm.status.highest.next();
            vm.status.generation = vm.status.highest;
        });
    }
    txn.order(host, id, operation, Verb::Remove { volumes });
    request::outcome(txn, operation)
}

/// Who deletes the disks of a VM: its host or, when that is lost and the VM is off, another that sees them all. Nobody, when it never
/// was on a host, or its host was removed and nobody sees them.
fn remover(world: &World, vm: &Vm) -> Result<Option<HostId>, Box<Refusal>> {
    if let Some(host) = vm.status.host.filter(|host| is_up(world, *host)) {
        return Ok(Some(host));
    }
    let pools = vm
        .volumes
        .iter()
        .filter_map(|id| world.volumes.get(id))
        .map(|row| row.pool);
    let mut pools: BTreeSet<_> = pools.collect();
    if vm.status.host.is_none() {
        pools.retain(|id| world.pools.get(id).is_some_and(|pool| !pool.hosts.is_empty()));
        if vm.status.highest == Generation(0) || pools.is_empty() {
            return Ok(None);
        }
    }
    let sees = |host: HostId| {
        pools
            .iter()
            .all(|id| world.pools.get(id).is_some_and(|pool| pool.hosts.contains(&host)))
    };
    let off = matches!(vm.status.state, VmState::Inactive | VmState::Failed);
    let other = world
        .hosts()
        .map(|row| row.id)
        .find(|id| off && is_up(world, *id) && sees(*id));
    match (other, vm.status.host) {
        (Some(other), _) => Ok(Some(other)),
        (None, Some(_)) => reachable(world, vm).map(Some),
        (None, None) => {
            let message = format!("VM {}: no connected host sees its disks", vm.name);
            let hint = "let a host of their pool connect, then ask again";
            Err(refuse(Code::HostUnreachable, message, hint))
        }
    }
}

/// Takes a VM out of the world, with its volumes; its addresses rest.
pub(crate) fn erase(txn: &mut Txn<'_>, id: VmId) {
    let Some(vm) = txn.world().vm(id).cloned() else { return };
    let until = txn.now.after(ADDRESS_RESTS);
    for port in &vm.ports {
        ports::release(txn, id, *port);
        txn.edit_port(*port, |port| {
            port.vm = None;
            port.bound = None;
            port.rests_until = Some(until);
        });
    }
    let disks = vm.volumes.iter().filter_map(|id| txn.world().volumes.get(id));
    let held = Usage {
        vms: 1,
        vcpus: u64::from(vm.spec.vcpus),
        memory_mib: vm.spec.memory_mib,
        disk_bytes: disks.map(|disk| disk.size_bytes).sum(),
    };
    txn.delete(Key::Seed(id));
    for id in &vm.volumes {
        let pool = txn.world().volumes.get(id).map(|volume| volume.pool);
        txn.delete(Key::Volume(*id));
        pool.into_iter().for_each(|pool| hosts::forget_pool(txn, pool));
    }
    if let Some(mut project) = txn.world().projects.get(&vm.project).cloned() {
        projects::subtract(&mut project.used, held);
        txn.put(Row::Project(project));
    }
    if let Some(host) = vm.status.host {
        txn.withdraw(host, id);
    }
    txn.notice_vm(&vm, "vm.deleted", String::new());
    txn.delete(Key::Vm(id));
    txn.transient().dirty.remove(&id);
}

/// Refuses while another copy of a VM may exist: after a hand-over that nobody can tell the end of.
pub(crate) fn cold(world: &World, vm: &Vm) -> Result<(), Box<Refusal>> {
    let Some(terms) = &vm.status.moving else {
        return Ok(());
    };
    let open: Vec<String> = [terms.source, terms.destination]
        .into_iter()
        .filter(|host| !vm.status.cleared.contains(host))
        .map(|host| host_name(world, host))
        .collect();
    if open.is_empty() {
        return Ok(());
    }
    let message = format!(
        "VM {} may still be on {}: its last move has no known end",
        vm.name,
        open.join(" or ")
    );
    let hint = "let their agents connect and tell, or reboot those hosts; of one whose machine is off for good say so: `godwit host \
                remove --force`";
    Err(refuse(Code::WrongState, message, hint))
}

/// Begins an operation on a VM and notes what people want of it.
fn begin(
    txn: &mut Txn<'_>,
    request: &Request,
    id: VmId,
    kind: OperationKind,
    allowed: Millis,
    power: Option<Power>,
) -> Result<OperationId, Box<Refusal>> {
    let world = txn.world();
    let vm = world.vm(id).expect("a VM that was looked up in this step is there");
    let operation = Fresh::of(request).operation(world)?;
    let begun = request::begun(request, operation, kind, request::vm_target(vm), txn.now, allowed);
    txn.begin_operation(begun);
    txn.edit_vm(id, |vm| {
        if let Some(power) = power.filter(|power| *power != vm.spec.power) {
            vm.spec.power = power;
            vm.revision = vm.revision.next();
        }
    });
    Ok(operation)
}

/// One operation, one order to the VM's host.
fn tell(
    txn: &mut Txn<'_>,
    request: &Request,
    id: VmId,
    kind: OperationKind,
    allowed: Millis,
    power: Option<Power>,
    verb: Verb,
) -> Decision {
    let world = txn.world();
    let vm = world.vm(id).expect("a VM that was looked up in this step is there");
    let host = reachable(world, vm)?;
    if request.dry_run {
        return request::stays(world, vm);
    }
    let operation = begin(txn, request, id, kind, allowed, power)?;
    txn.order(host, id, operation, verb);
    request::outcome(txn, operation)
}

/// An operation that has nothing to do.
fn already(txn: &mut Txn<'_>, request: &Request, id: VmId, kind: OperationKind) -> Decision {
    let world = txn.world();
    let vm = world.vm(id).expect("a VM that was looked up in this step is there");
    if request.dry_run {
        return request::stays(world, vm);
    }
    let (operation, target) = (Fresh::of(request).operation(world)?, request::vm_target(vm));
    request::done(txn, request, operation, kind, target)
}

/// The host of a VM, if its agent is connected.
pub(crate) fn reachable(world: &World, vm: &Vm) -> Result<HostId, Box<Refusal>> {
    match vm.status.host {
        Some(host) if is_up(world, host) => Ok(host),
        Some(host) => {
            let message = format!("VM {}'s host {} is not connected", vm.name, host_name(world, host));
            Err(refuse(
                Code::HostUnreachable,
                message,
                "start its agent or repair its network, then ask again",
            ))
        }
        None => Err(wrong(vm, "reach", &format!("start it: `godwit vm start {}`", vm.name))),
    }
}

/// Whether a host's agent is connected.
pub(crate) fn is_up(world: &World, host: HostId) -> bool {
    world.host(host).is_some_and(|host| host.status.link == Link::Up)
}

/// A host's name for messages, or its id when it is gone.
pub(crate) fn host_name(world: &World, host: HostId) -> String {
    world
        .host(host)
        .map_or_else(|| host.to_string(), |host| host.name.to_string())
}

/// The refusal of a verb that the VM's state does not allow.
pub(crate) fn wrong(vm: &Vm, verb: &str, hint: &str) -> Box<Refusal> {
    let reason = vm
        .status
        .reason
        .as_ref()
        .map(|reason| format!(" ({reason})"))
        .unwrap_or_default();
    let message = format!("cannot {verb} VM {}: it is {}{reason}", vm.name, vm.status.state);
    refuse(Code::WrongState, message, hint)
}
