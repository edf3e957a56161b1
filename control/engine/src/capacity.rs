//! What hosts offer and what VMs hold of it.

use model::{Host, HostId, query::Share};

use crate::world::World;

/// A host's vCPUs: held and, with its over-commit, on offer. Nothing is on offer before its facts are known.
pub(crate) fn vcpus(world: &World, host: &Host) -> Share {
    let cpus = host.status.facts.as_ref().map_or(0, |facts| u64::from(facts.cpus));
    Share {
        used: world.held(host.id).vcpus,
        offered: percent(cpus, host.spec.cpu_percent),
    }
}

/// A host's memory, MiB: held and, with its over-commit, on offer.
pub(crate) fn memory_mib(world: &World, host: &Host) -> Share {
    let memory = host.status.facts.as_ref().map_or(0, |facts| facts.memory_mib);
    Share {
        used: world.held(host.id).memory_mib,
        offered: percent(memory, host.spec.memory_percent),
    }
}

/// What is left of a share.
pub(crate) fn left(share: Share) -> u64 {
    share.offered.saturating_sub(share.used)
}

fn percent(amount: u64, percent: u32) -> u64 {
    let wide = u128::from(amount) * u128::from(percent) / 100;
    u64::try_from(wide).unwrap_or(u64::MAX)
}

/// Whether a host holds more than it offers: only when its facts or its over-commit shrank.
pub(crate) fn is_exceeded(world: &World, host: HostId) -> bool {
    world.host(host).is_some_and(|row| {
        let over = |share: Share| share.used > share.offered;
        row.status.facts.is_some() && (over(vcpus(world, row)) || over(memory_mib(world, row)))
    })
}
