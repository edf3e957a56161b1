//! The world's invariants as a check that tests and the simulator run after every step.

use std::collections::{BTreeMap, BTreeSet};

use model::{Generation, VmId, access::Usage};

use crate::{World, capacity, index};

/// Everything that must hold of a world at rest between two steps; the first thing that does not, in words.
///
/// # Errors
/// The broken invariant.
pub fn audit(world: &World) -> Result<(), String> {
    capacity_holds(world)?;
    unique(world)?;
    operations_hold(world)?;
    usage_adds_up(world)
}

/// What must hold between a world and a later one: generations only grow, and none is given to a second host.
///
/// # Errors
/// The broken invariant.
pub fn audit_step(before: &BTreeMap<VmId, (Generation, Option<model::HostId>)>, world: &World) -> Result<(), String> {
    for vm in world.vms() {
        let Some((generation, host)) = before.get(&vm.id) else {
            continue;
        };
        let now = vm.status.generation;
        if now < *generation {
            return Err(format!("VM {}'s generation went from {generation} to {now}", vm.name));
        }
        if now == *generation && host.is_some() && vm.status.host.is_some() && *host != vm.status.host {
            return Err(format!("VM {}'s generation {now} was given to a second host", vm.name));
        }
    }
    Ok(())
}

/// What [`audit_step`] compares with.
#[must_use]
pub fn generations(world: &World) -> BTreeMap<VmId, (Generation, Option<model::HostId>)> {
    world
        .vms()
        .map(|vm| (vm.id, (vm.status.generation, vm.status.host)))
        .collect()
}

fn capacity_holds(world: &World) -> Result<(), String> {
    let mut held: BTreeMap<_, index::Held> = BTreeMap::new();
    for vm in world.vms() {
        for host in index::holders(vm) {
            let held = held.entry(host).or_default();
            held.vms += 1;
            held.vcpus += u64::from(vm.spec.vcpus);
            held.memory_mib += vm.spec.memory_mib;
        }
    }
    for host in world.hosts() {
        if world.held(host.id) != held.get(&host.id).copied().unwrap_or_default() {
            return Err(format!("host {}: the index of what is held is wrong", host.name));
        }
        if capacity::is_exceeded(world, host.id) {
            return Err(format!(
                "host {} holds more than it offers: {:?}",
                host.name,
                world.held(host.id)
            ));
        }
    }
    Ok(())
}

fn unique(world: &World) -> Result<(), String> {
    let mut names = BTreeSet::new();
    let mut addresses = BTreeSet::new();
    let mut macs = BTreeSet::new();
    for vm in world.vms() {
        if !names.insert((vm.project, &vm.name)) {
            return Err(format!("two VMs are called {}", vm.name));
        }
        if vm.status.generation > vm.status.highest {
            return Err(format!("VM {} has a generation above the highest", vm.name));
        }
    }
    for port in world.ports() {
        if !addresses.insert((port.subnet, port.ip)) || !macs.insert(port.mac) {
            return Err(format!("two ports have the address {} {}", port.ip, port.mac));
        }
        if port.vm.is_none() != port.rests_until.is_some() {
            return Err(format!("port {} neither belongs to a VM nor rests", port.id));
        }
    }
    let mut hosts = BTreeSet::new();
    match world.hosts().find(|host| !hosts.insert(&host.name)) {
        Some(host) => Err(format!("two hosts are called {}", host.name)),
        None => Ok(()),
    }
}

fn operations_hold(world: &World) -> Result<(), String> {
    let mut targets = BTreeSet::new();
    for operation in world.operations() {
        if operation.state.is_over() != operation.finished_at.is_some() {
            return Err(format!(
                "operation {} is over without an end, or the reverse",
                operation.id
            ));
        }
        if operation.state.is_over() {
            continue;
        }
        if !targets.insert((operation.target.kind, operation.target.id)) {
            return Err(format!("two operations hold {}", operation.target.name));
        }
        if let Some(vm) = world.vm(VmId(operation.target.id))
            && vm.operation != Some(operation.id)
        {
            return Err(format!(
                "operation {} runs without holding VM {}",
                operation.id, vm.name
            ));
        }
    }
    for vm in world.vms() {
        let over = |id| world.operation(id).is_none_or(|operation| operation.state.is_over());
        if vm.operation.is_some_and(over) {
            return Err(format!("VM {} is held by an operation that is over", vm.name));
        }
    }
    Ok(())
}

fn usage_adds_up(world: &World) -> Result<(), String> {
    for project in world.projects() {
        let mut used = Usage::default();
        for vm in world.vms().filter(|vm| vm.project == project.id) {
            used.vms += 1;
            used.vcpus += u64::from(vm.spec.vcpus);
            used.memory_mib += vm.spec.memory_mib;
        }
        let disks = world.volumes.values().filter(|volume| volume.project == project.id);
        used.disk_bytes = disks.map(|volume| volume.size_bytes).sum();
        if used != project.used {
            return Err(format!(
                "project {} counts {:?}, its VMs hold {used:?}",
                project.name, project.used
            ));
        }
    }
    Ok(())
}
