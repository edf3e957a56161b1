//! Where a VM goes: filters that each say why not and the smallest change that would allow it, then a score.

use std::collections::BTreeSet;

use model::{
    Code, Host, HostId, Plan, Pool, PoolId, Refusal, Vm, VmId,
    command::HostVerdict,
    host::{Accelerator, Link},
    layout::Family,
};

use crate::{capacity, world::World};

/// What a VM needs of a host.
#[derive(Clone, Debug)]
pub(crate) struct Need {
    /// What it is called in messages.
    pub(crate) name: String,
    /// The VM, if it exists: what it holds on a host already is not counted against it there.
    pub(crate) vm: Option<VmId>,
    pub(crate) vcpus: u64,
    pub(crate) memory_mib: u64,
    pub(crate) machine: Machine,
    /// One of these pools must be seen by the host.
    pub(crate) any_pool: BTreeSet<PoolId>,
    /// Each of these pools must be seen by the host.
    pub(crate) all_pools: BTreeSet<PoolId>,
}

/// Which emulated machine.
#[derive(Clone, Debug)]
pub(crate) enum Machine {
    /// The newest of a family: it is not fixed yet.
    Newest(Family),
    /// Exactly this one.
    Exact { machine: String, accelerator: Accelerator },
}

impl Need {
    /// What a VM whose hardware is fixed needs.
    pub(crate) fn of(world: &World, vm: &Vm) -> Self {
        let volumes = vm.volumes.iter().filter_map(|id| world.volumes.get(id));
        let all_pools: BTreeSet<PoolId> = volumes.map(|volume| volume.pool).collect();
        // The boot blobs lie beside the first volume; a VM without one takes them from any pool of its template.
        let any_pool = if all_pools.is_empty() {
            template_pools(world, vm)
        } else {
            BTreeSet::new()
        };
        Self {
            name: vm.name.to_string(),
            vm: Some(vm.id),
            vcpus: u64::from(vm.spec.vcpus),
            memory_mib: vm.spec.memory_mib,
            machine: Machine::Exact {
                machine: vm.layout.machine.clone(),
                accelerator: vm.layout.accelerator,
            },
            any_pool,
            all_pools,
        }
    }
}

/// The pools that hold the blobs of a VM's template.
pub(crate) fn template_pools(world: &World, vm: &Vm) -> BTreeSet<PoolId> {
    let template = world.templates.get(&vm.spec.template);
    template
        .map(|template| ready_pools(&template.state))
        .unwrap_or_default()
}

/// The pools that hold the blobs of a template in this state.
pub(crate) fn ready_pools(state: &model::template::TemplateState) -> BTreeSet<PoolId> {
    match state {
        model::template::TemplateState::Ready { pools } => pools.iter().copied().collect(),
        _ => BTreeSet::new(),
    }
}

/// What placement says of one host.
pub(crate) fn verdict(world: &World, host: &Host, need: &Need) -> HostVerdict {
    let mut refused = Vec::new();
    if host.status.link == Link::Lost {
        refused.push(format!(
            "{} is not connected; start its agent or repair its network",
            host.name
        ));
    }
    if !host.spec.schedulable {
        refused.push(format!("{} takes no new VMs; make it schedulable again", host.name));
    }
    let mut score = 0;
    match &host.status.facts {
        None => refused.push(format!(
            "nothing is known of {} yet; wait for its agent to connect",
            host.name
        )),
        Some(facts) => {
            machine_fits(host, &facts.hypervisor, need, &mut refused);
            pools_fit(world, host, need, &mut refused);
            score = room(world, host, need, &mut refused);
        }
    }
    HostVerdict {
        host: host.id,
        name: host.name.clone(),
        score: if refused.is_empty() { score } else { 0 },
        refused,
    }
}

fn machine_fits(host: &Host, hypervisor: &model::host::Hypervisor, need: &Need, refused: &mut Vec<String>) {
    match &need.machine {
        Machine::Newest(family) => {
            if !hypervisor.machines.contains_key(family) {
                refused.push(format!(
                    "{}'s {} {} has no machine of family {family}; choose another family or install a newer one",
                    host.name, hypervisor.kind, hypervisor.version
                ));
            }
        }
        Machine::Exact { machine, accelerator } => {
            if !hypervisor.machine_types.contains(machine) {
                refused.push(format!(
                    "{}'s {} {} does not know machine type {machine}; install a version that does there",
                    host.name, hypervisor.kind, hypervisor.version
                ));
            }
            if hypervisor.accelerator != *accelerator {
                refused.push(format!(
                    "{} runs guests by {}, {} needs {accelerator}; choose a host with {accelerator}",
                    host.name, hypervisor.accelerator, need.name
                ));
            }
        }
    }
}

fn pools_fit(world: &World, host: &Host, need: &Need, refused: &mut Vec<String>) {
    let sees = |id: &PoolId| world.pools.get(id).is_some_and(|pool| pool.hosts.contains(&host.id));
    let name = |id: &PoolId| {
        world
            .pools
            .get(id)
            .map_or_else(|| id.to_string(), |pool| pool.name.to_string())
    };
    for pool in need.all_pools.iter().filter(|id| !sees(id)) {
        refused.push(format!(
            "{0} does not see pool {1}, which holds disks of {2}; mount it there",
            host.name,
            name(pool),
            need.name
        ));
    }
    if need.all_pools.is_empty() && !need.any_pool.iter().any(sees) {
        let pools: Vec<String> = need.any_pool.iter().take(3).map(name).collect();
        refused.push(format!(
            "{} sees none of the pools that hold the template ({}); mount one there",
            host.name,
            pools.join(", ")
        ));
    }
}

/// Checks that there is room, and scores by what would be left: half for memory, half for CPU.
fn room(world: &World, host: &Host, need: &Need, refused: &mut Vec<String>) -> u32 {
    let there = need.vm.and_then(|id| world.vm(id));
    let counted = there.is_some_and(|vm| crate::index::holders(vm).contains(&host.id));
    let mut part = |share: model::query::Share, wanted: u64, what: &str| {
        let left = capacity::left(share) + if counted { wanted.min(share.used) } else { 0 };
        if wanted > left {
            refused.push(format!(
                "{} has {left} of {} {what} left, {} needs {wanted}; free some or choose another host",
                host.name, share.offered, need.name
            ));
            return 0;
        }
        let after = u128::from(left - wanted) * 500 / u128::from(share.offered.max(1));
        u32::try_from(after.min(500)).unwrap_or(500)
    };
    let memory = part(capacity::memory_mib(world, host), need.memory_mib, "MiB of memory");
    let cpu = part(capacity::vcpus(world, host), need.vcpus, "vCPUs");
    memory + cpu
}

/// The verdicts of all hosts, or of the one that was asked for, and the best that will do. Equal hosts: the lowest id.
pub(crate) fn plan(world: &World, need: &Need, only: Option<HostId>, extra: impl Fn(&Host) -> Vec<String>) -> Plan {
    let hosts = world.hosts().filter(|host| only.is_none_or(|only| only == host.id));
    let hosts: Vec<HostVerdict> = hosts
        .map(|host| {
            let mut verdict = verdict(world, host, need);
            verdict.refused.extend(extra(host));
            if !verdict.refused.is_empty() {
                verdict.score = 0;
            }
            verdict
        })
        .collect();
    let best = hosts
        .iter()
        .filter(|verdict| verdict.refused.is_empty())
        .max_by_key(|verdict| (verdict.score, std::cmp::Reverse(verdict.host)));
    Plan {
        vm: need.vm,
        host: best.map(|verdict| verdict.host),
        host_name: best.map(|verdict| verdict.name.clone()),
        hosts,
    }
}

/// The chosen host, or why there is none.
pub(crate) fn chosen(plan: &Plan, need: &Need, code: Code) -> Result<HostId, Box<Refusal>> {
    if let Some(host) = plan.host {
        return Ok(host);
    }
    if plan.hosts.is_empty() {
        let message = format!("no host can take VM {}: the cell has no hosts", need.name);
        return Err(Box::new(Refusal::new(Code::NoCapacity, message).hint(
            "add one: `godwit host add-token`, then `godwit agent --join TOKEN@ADDRESS` there",
        )));
    }
    // One reason of each host says enough; the plan of a dry run says all.
    let reasons = plan.hosts.iter().filter_map(|verdict| verdict.refused.first());
    let mut text = reasons.take(3).cloned().collect::<Vec<_>>().join("; ");
    if plan.hosts.len() > 3 {
        text = format!("{text}; and {} more hosts", plan.hosts.len() - 3);
    }
    let message = format!("no host can take VM {}: {text}", need.name);
    Err(Box::new(
        Refusal::new(code, message).hint("`--dry-run` shows every host with all its reasons"),
    ))
}

/// The pool for a new VM on a host: one that holds the template, seen by the most hosts; equal ones: the lowest id.
pub(crate) fn pool<'w>(world: &'w World, host: HostId, of: &BTreeSet<PoolId>) -> Option<&'w Pool> {
    of.iter()
        .filter_map(|id| world.pools.get(id))
        .filter(|pool| pool.hosts.contains(&host))
        .max_by_key(|pool| (pool.hosts.len(), std::cmp::Reverse(pool.id)))
}
