//! Projects: made, bounded and deleted; and what their VMs may hold.

use model::{
    Code, Key, Name, NetworkId, Outcome, Project, ProjectId, Refusal, Request, Row, TokenId, UserId,
    access::{Quota, Usage},
    name::Reference,
};

use crate::{
    request::{Decision, Fresh, refuse},
    txn::Txn,
    world::World,
};

/// Most projects of a cell.
const PROJECTS_MAX: usize = 10_000;

/// The project that always exists; its network `default` serves projects that have none.
const DEFAULT: &str = "default";

/// The project that is meant, if the actor has a role in it.
pub(crate) fn find<'w>(
    world: &'w World,
    request: &Request,
    reference: &Reference,
) -> Result<&'w Project, Box<Refusal>> {
    let found = named(world, reference);
    found.ok_or_else(|| unknown(reference)).inspect(|_| {
        debug_assert!(request.actor.role == model::Role::CloudAdmin);
    })
}

/// The project with this name or id, whoever asks.
pub(crate) fn named<'w>(world: &'w World, reference: &Reference) -> Option<&'w Project> {
    match reference {
        Reference::Id(id) => world.project(ProjectId(*id)),
        Reference::Name(name) => world.project_by_name(name),
    }
}

/// There is none, or none that the actor may know of.
pub(crate) fn unknown(reference: &Reference) -> Box<Refusal> {
    let message = format!("there is no project {reference} in which you have a role");
    refuse(
        Code::NotFound,
        message,
        "`godwit project list` shows those that you have",
    )
}

/// Makes a project.
pub(crate) fn create(txn: &mut Txn<'_>, request: &Request, name: &Name, quota: Quota) -> Decision {
    let world = txn.world();
    if world.project_by_name(name).is_some() {
        let message = format!("there is a project {name} already");
        return Err(refuse(Code::NameTaken, message, "choose another name"));
    }
    if world.projects.len() >= PROJECTS_MAX {
        let message = format!("the cell has {PROJECTS_MAX} projects, which is as many as it takes");
        return Err(refuse(Code::NoCapacity, message, "delete projects that nobody uses"));
    }
    let mut fresh = Fresh::of(request);
    let id = loop {
        let id: ProjectId = fresh.next()?;
        if !world.projects.contains_key(&id) {
            break id;
        }
    };
    if !request.dry_run {
        txn.put(Row::Project(Project {
            id,
            name: name.clone(),
            quota,
            used: Usage::default(),
        }));
    }
    Ok(Outcome::Done)
}

/// Bounds what a project's VMs may hold.
pub(crate) fn set_quota(txn: &mut Txn<'_>, request: &Request, reference: &Reference, quota: Quota) -> Decision {
    let mut project = find(txn.world(), request, reference)?.clone();
    project.quota = quota;
    if !request.dry_run {
        txn.put(Row::Project(project));
    }
    Ok(Outcome::Done)
}

/// Deletes a project in which nothing is left.
pub(crate) fn delete(txn: &mut Txn<'_>, request: &Request, reference: &Reference) -> Decision {
    let project = find(txn.world(), request, reference)?.clone();
    if project.name.as_str() == DEFAULT {
        let message = "project default cannot be deleted";
        return Err(refuse(Code::WrongState, message, "delete what is in it instead"));
    }
    if let Some(left) = left_in(txn.world(), project.id) {
        let message = format!("project {} is not empty: {left}", project.name);
        return Err(refuse(Code::WrongState, message, "delete what is in it first"));
    }
    if !request.dry_run {
        clear(txn, project.id);
        txn.delete(Key::Project(project.id));
    }
    Ok(Outcome::Done)
}

/// What keeps a project from being deleted.
fn left_in(world: &World, project: ProjectId) -> Option<String> {
    let index = &world.index;
    let many = |count: usize, what: &str| (count > 0).then(|| format!("it has {count} {what}"));
    let (vm, volume) = (model::VmId(nil()), model::VolumeId(nil()));
    let vms = index.vms.range((project, vm)..).take_while(|(of, _)| *of == project);
    let volumes = index
        .volumes
        .range((project, volume)..)
        .take_while(|(of, _)| *of == project);
    let templates = index.templates.range((project, model::TemplateId(nil()))..);
    let templates = templates.take_while(|(of, _)| *of == project);
    let networks = index.networks.range((project, NetworkId(nil()))..);
    let networks = networks.take_while(|(of, _)| *of == project);
    let groups = index.security_groups.range((project, model::SecurityGroupId(nil()))..);
    let groups = groups.take_while(|(of, _)| *of == project);
    many(vms.count(), "VMs")
        .or_else(|| many(volumes.count(), "volumes"))
        .or_else(|| many(templates.count(), "templates"))
        .or_else(|| many(networks.count(), "networks"))
        .or_else(|| many(groups.count(), "security groups"))
}

/// Takes away what only made sense in a project: its service tokens, roles in it; its addresses rest on in the network's own project.
fn clear(txn: &mut Txn<'_>, project: ProjectId) {
    let world = txn.world();
    let tokens: Vec<TokenId> = world.index.service_tokens(project).collect();
    let users: Vec<UserId> = world.index.users_of(project).collect();
    let resting = world.index.resting.iter().map(|(_, port)| *port);
    let resting: Vec<_> = resting
        .filter(|id| world.ports.get(id).is_some_and(|port| port.project == project))
        .collect();
    for port in resting {
        let network = txn.world().ports.get(&port).map(|port| port.network);
        let owner = network
            .and_then(|id| txn.world().networks.get(&id))
            .map(|network| network.project);
        if let Some(owner) = owner {
            txn.edit_port(port, |port| port.project = owner);
        }
    }
    tokens.into_iter().for_each(|id| txn.delete(Key::ApiToken(id)));
    for id in users {
        txn.edit_user(id, |user| {
            user.grants.remove(&project);
        });
    }
}

/// The network that is meant: the project's own, or for `default` the one that serves projects without.
pub(crate) fn network(world: &World, project: ProjectId, reference: &Reference) -> Option<NetworkId> {
    match reference {
        Reference::Id(id) => {
            let network = world.networks.get(&NetworkId(*id))?;
            (network.project == project || shared_network(world, project) == Some(network.id)).then_some(network.id)
        }
        Reference::Name(name) => {
            let own = world.index.network_names.get(&(project, name.clone())).copied();
            own.or_else(|| shared_network(world, project).filter(|_| name.as_str() == DEFAULT))
        }
    }
}

/// The network `default` of project `default`, for a project that has no `default` of its own.
pub(crate) fn shared_network(world: &World, project: ProjectId) -> Option<NetworkId> {
    let name: Name = DEFAULT.parse().expect("`default` is a name");
    let host = world.project_by_name(&name)?.id;
    let own = world.index.network_names.contains_key(&(project, name.clone()));
    let shared = world.index.network_names.get(&(host, name)).copied();
    shared.filter(|_| host != project && !own)
}

/// Whether a project may hold more; the refusal says what it holds, what was asked, and what is allowed.
///
/// # Errors
/// `QuotaExceeded`, for the first bound that would be passed.
pub(crate) fn within(project: &Project, more: Usage) -> Result<(), Box<Refusal>> {
    let (quota, used) = (&project.quota, &project.used);
    let bounds = [
        ("VMs", quota.vms, used.vms, more.vms),
        ("vCPUs", quota.vcpus, used.vcpus, more.vcpus),
        ("MiB of memory", quota.memory_mib, used.memory_mib, more.memory_mib),
        ("bytes of disk", quota.disk_bytes, used.disk_bytes, more.disk_bytes),
    ];
    for (what, bound, used, more) in bounds {
        if let Some(bound) = bound.filter(|bound| more > 0 && used.saturating_add(more) > *bound) {
            let message = format!(
                "project {} may hold {bound} {what}; it holds {used}, and {more} more were asked for",
                project.name
            );
            return Err(refuse(
                Code::QuotaExceeded,
                message,
                "delete VMs, make this one smaller, or ask a cloud admin for more: `godwit project quota`",
            ));
        }
    }
    Ok(())
}

/// Counts what comes to a project.
pub(crate) fn add(used: &mut Usage, more: Usage) {
    used.vms = used.vms.saturating_add(more.vms);
    used.vcpus = used.vcpus.saturating_add(more.vcpus);
    used.memory_mib = used.memory_mib.saturating_add(more.memory_mib);
    used.disk_bytes = used.disk_bytes.saturating_add(more.disk_bytes);
}

/// Counts what leaves a project.
pub(crate) fn subtract(used: &mut Usage, less: Usage) {
    used.vms = used.vms.saturating_sub(less.vms);
    used.vcpus = used.vcpus.saturating_sub(less.vcpus);
    used.memory_mib = used.memory_mib.saturating_sub(less.memory_mib);
    used.disk_bytes = used.disk_bytes.saturating_sub(less.disk_bytes);
}

fn nil() -> uuid::Uuid {
    uuid::Uuid::nil()
}
