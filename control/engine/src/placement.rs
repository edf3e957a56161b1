//! Where a VM goes: filters that each say why not and the smallest change that would allow it, then a score.

use std::collections::BTreeSet;

use model::{
    Code, Host, HostId, Plan, Pool, PoolId, Refusal, Template, TemplateId, Vm, VmId,
    command::HostVerdict,
    host::{Accelerator, Link},
    layout::Family,
};

use crate::{capacity, templates, world::World};

/// What a host's score gains by having the template already: as much as a fifth of its memory and CPU left free.
const HAS_TEMPLATE: u32 = 200;

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
    /// Where no pool is given yet: what must be, or can be brought, into one that the host sees.
    pub(crate) template: Option<FromTemplate>,
    /// Each of these pools must be seen by the host.
    pub(crate) all_pools: BTreeSet<PoolId>,
}

/// What a VM is made from, whose disks have no pool yet.
#[derive(Clone, Copy, Debug)]
pub(crate) struct FromTemplate {
    pub(crate) id: TemplateId,
    /// Into this pool and no other.
    pub(crate) only: Option<PoolId>,
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
        // The boot blobs lie beside the first volume; a VM without one takes them from any pool.
        let template = all_pools.is_empty().then_some(FromTemplate {
            id: vm.spec.template,
            only: None,
        });
        Self {
            name: vm.name.to_string(),
            vm: Some(vm.id),
            vcpus: u64::from(vm.spec.vcpus),
            memory_mib: vm.spec.memory_mib,
            machine: Machine::Exact {
                machine: vm.layout.machine.clone(),
                accelerator: vm.layout.accelerator,
            },
            template,
            all_pools,
        }
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
            score = room(world, host, need, &mut refused) + template_fits(world, host, need, &mut refused);
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
}

/// Checks that a pool of the host has the template or can get it; what the score gains when it has.
fn template_fits(world: &World, host: &Host, need: &Need, refused: &mut Vec<String>) -> u32 {
    let Some(from) = need.template else { return 0 };
    match pool(world, host, from) {
        Ok(pool) if has(world, from.id, pool.id) => HAS_TEMPLATE,
        Ok(_) => 0,
        Err(reason) => {
            refused.push(reason);
            0
        }
    }
}

/// Whether a pool holds all blobs of a template.
fn has(world: &World, template: TemplateId, pool: PoolId) -> bool {
    world
        .templates
        .get(&template)
        .is_some_and(|row| row.state.holding().contains(&pool))
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

/// The pool for a new VM on a host: one that has the template before one into which it is brought already, before one that many hosts
/// see; equal ones: the lowest id. Else why there is none.
pub(crate) fn pool<'w>(world: &'w World, host: &Host, from: FromTemplate) -> Result<&'w Pool, String> {
    let template = world.templates.get(&from.id);
    let template = template.ok_or_else(|| format!("template {} is gone; choose another one", from.id))?;
    let seen = world.pools.values().filter(|pool| pool.hosts.contains(&host.id));
    let mut reasons = Vec::new();
    let usable = seen.filter(|pool| from.only.is_none_or(|only| only == pool.id));
    let usable = usable.filter(|pool| match why_not(world, host, template, pool) {
        None => true,
        Some(reason) => {
            reasons.push(reason);
            false
        }
    });
    let comes = |pool: &Pool| template.state.touched().any(|touched| touched == pool.id);
    let rank = |pool: &&Pool| {
        let has = template.state.holding().contains(&pool.id);
        (has, comes(pool), pool.hosts.len(), std::cmp::Reverse(pool.id))
    };
    if let Some(pool) = usable.max_by_key(rank) {
        return Ok(pool);
    }
    Err(match (reasons.into_iter().next(), from.only) {
        (Some(reason), _) => reason,
        (None, Some(only)) => {
            let name = world
                .pools
                .get(&only)
                .map_or_else(|| only.to_string(), |pool| pool.name.to_string());
            format!("{} does not see pool {name}; mount it there", host.name)
        }
        (None, None) => format!(
            "{} has no pool for the VM's disk; start its agent with --pool NAME=DIRECTORY",
            host.name
        ),
    })
}

/// Why a pool that a host sees cannot take a VM of a template: it does not answer, or the template is not there and cannot be brought.
fn why_not(world: &World, host: &Host, template: &Template, pool: &Pool) -> Option<String> {
    let facts = host
        .status
        .facts
        .as_ref()?
        .pools
        .iter()
        .find(|facts| facts.id == pool.id)?;
    if facts.silent_since.is_some() {
        return Some(format!(
            "{}'s pool {} does not answer; repair its file system",
            host.name, pool.name
        ));
    }
    if template.state.holding().contains(&pool.id) {
        return None;
    }
    let (needed, free) = (template.content.size_bytes(), facts.free_bytes);
    if free < needed {
        let (needed, free) = (needed.div_ceil(1 << 20), free >> 20);
        return Some(format!(
            "{}'s pool {} has {free} MiB free and template {} takes {needed}; free some",
            host.name, pool.name, template.name
        ));
    }
    templates::dropping_from(world, pool.id).map(|dropper| {
        let by = crate::lifecycle::host_name(world, dropper);
        format!(
            "{by} still removes a template from pool {}; wait until it has",
            pool.name
        )
    })
}
