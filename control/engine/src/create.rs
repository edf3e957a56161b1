//! Making a VM: bounds, quota, host, pool, address, disk, hardware; then the order that builds it.

use std::{collections::BTreeSet, net::Ipv4Addr};

use model::{
    Code, Generation, Host, HostId, Mac, Millis, NetworkId, OperationId, OperationKind, Outcome, Plan, PoolId, Port,
    PortId, PortSpec, Refusal, Request, Revision, Row, SubnetId, Template, Vm, VmId, VmSpec, VmState, VmStatus, Volume,
    VolumeId,
    access::{Project, Usage},
    addressing::V6Prefix,
    command::CreateVm,
    layout::Layout,
    operation::TargetKind,
    order::Verb,
    seed::{self, GuestSeed, SeedRow},
    storage::Format,
    template::{Boot, Seed, TemplateState},
    vm::Power,
};

use crate::{
    definition,
    placement::{self, FromTemplate, Machine, Need},
    ports, projects,
    request::{self, Decision, Fresh, refuse},
    templates,
    txn::{Txn, target},
    world::World,
};

/// How long making a VM may take.
const CREATE_MAX: Millis = Millis::seconds(300);
/// Most vCPUs of a VM.
const VCPUS_MAX: u16 = 64;
/// Least memory of a VM, MiB.
const MEMORY_MIN_MIB: u64 = 64;
/// Most memory of a VM, MiB.
const MEMORY_MAX_MIB: u64 = 1 << 20;
/// Smallest disk, bytes.
const DISK_MIN: u64 = 1 << 20;
/// Largest disk, bytes.
const DISK_MAX: u64 = 64 << 40;

/// All that was decided before anything changes.
struct Decided<'w> {
    template: &'w Template,
    network: NetworkId,
    subnet: SubnetId,
    ip: Ipv4Addr,
    v6: Option<V6Prefix>,
    disk_bytes: Option<u64>,
    port: PortSpec,
    from: FromTemplate,
    plan: Plan,
    host: Result<HostId, Box<Refusal>>,
}

/// Makes a VM and, unless asked otherwise, starts it.
pub(crate) fn vm(txn: &mut Txn<'_>, request: &Request, wanted: &CreateVm) -> Decision {
    let world = txn.world();
    let decided = decide(world, request, wanted)?;
    if request.dry_run {
        return Ok(Outcome::Plan(decided.plan));
    }
    let host = decided.host.clone()?;
    let row = world.host(host).expect("a host that was chosen is there");
    let pool = placement::pool(world, row, decided.from);
    let pool = pool.expect("a host that was chosen has a pool for the template").id;
    let mut fresh = Fresh::of(request);
    let operation = fresh.operation(world)?;
    let id: VmId = fresh.next()?;
    if world.vms.contains_key(&id) {
        return Err(refuse(
            Code::InvalidInput,
            "the request's fresh ids are not fresh",
            "send it again",
        ));
    }
    let port = port(world, &mut fresh, request, &decided, id)?;
    let volume = volume(&mut fresh, request, &decided, id, pool)?;
    let vm = row_of(txn, request, wanted, &decided, row, id, &port, volume.as_ref())?;
    let project = world.projects[&request.actor.project].clone();
    let more = usage(wanted, decided.disk_bytes);
    let seeded = decided.template.content.seed == Seed::NoCloud;
    let groups = port.spec.groups.clone();
    let template = decided.template.id;
    write(txn, vm, port, volume, project, more);
    // Its address is one of its groups' from here on.
    let told = ports::concerned_by(txn.world(), groups);
    ports::renew(txn, told);
    if seeded {
        let seed = guest_seed(wanted);
        txn.put(Row::Seed(Box::new(SeedRow { vm: id, seed })));
    }
    let target = target(TargetKind::Vm, id.0, &wanted.name);
    if !wanted.start {
        return request::done(txn, request, operation, OperationKind::CreateVm, target);
    }
    let allowed = templates::allowed(txn.world(), template, pool, CREATE_MAX);
    let begun = request::begun(request, operation, OperationKind::CreateVm, target, txn.now, allowed);
    txn.begin_operation(begun);
    place(txn, id, host);
    order_start(txn, id, host, operation);
    request::outcome(txn, operation)
}

/// Orders a host that placement chose to build and start a VM.
pub(crate) fn order_start(txn: &mut Txn<'_>, id: VmId, host: HostId, operation: OperationId) {
    let world = txn.world();
    let vm = world.vm(id).expect("a VM that is started is there");
    let (template, definition) = (vm.spec.template, definition::of(world, vm, host));
    let definition = definition.expect("a host that was chosen has a pool for the template");
    templates::bring(txn, template, definition.pool, host);
    let verb = Verb::Start {
        definition: Box::new(definition),
        paused: false,
        // Each order gets it as it is sent: the outbox keeps no secret.
        seed: None,
    };
    txn.order(host, id, operation, verb);
}

/// Gives a VM to a host under a fresh generation, to be started there.
pub(crate) fn place(txn: &mut Txn<'_>, id: VmId, host: HostId) {
    txn.edit_vm(id, |vm| {
        let status = &mut vm.status;
        status.state = VmState::Provisioning;
        status.reason = None;
        status.host = Some(host);
        status.highest = status.highest.next();
        status.generation = status.highest;
        status.moving = None;
        status.cleared.clear();
    });
    bind(txn, id, host);
}

/// Binds a VM's ports and volumes to the host and generation that hold it.
pub(crate) fn bind(txn: &mut Txn<'_>, id: VmId, host: HostId) {
    let Some(vm) = txn.world().vm(id) else { return };
    let (generation, ports, volumes) = (vm.status.generation, vm.ports.clone(), vm.volumes.clone());
    for port in ports {
        txn.edit_port(port, |port| {
            port.bound = Some(host);
            port.generation = generation;
        });
    }
    for volume in volumes {
        txn.edit_volume(volume, |volume| volume.generation = generation);
    }
}

fn decide<'w>(world: &'w World, request: &Request, wanted: &CreateVm) -> Result<Decided<'w>, Box<Refusal>> {
    let actor = &request.actor;
    bounds(wanted)?;
    if world.index.vm_names.contains_key(&(actor.project, wanted.name.clone())) {
        let message = format!("there is a VM {} in this project already", wanted.name);
        return Err(refuse(Code::NameTaken, message, "choose another name"));
    }
    let template = request::template(world, actor, &wanted.template)?;
    ready(template)?;
    seed_bounds(wanted, template)?;
    let disk_bytes = disk(wanted, template)?;
    projects::within(&world.projects[&actor.project], usage(wanted, disk_bytes))?;
    let (network, subnet, ip) = address(world, request, wanted)?;
    let port = PortSpec {
        groups: ports::groups_of(world, actor, &wanted.security_groups, &BTreeSet::new())?,
        allowed: ports::addresses(&wanted.allow_addresses)?,
        ..PortSpec::default()
    };
    let only = wanted.pool.as_ref().map(|pool| named_pool(world, pool)).transpose()?;
    let from = FromTemplate { id: template.id, only };
    let need = Need {
        name: wanted.name.to_string(),
        vm: None,
        vcpus: u64::from(wanted.vcpus),
        memory_mib: wanted.memory_mib,
        machine: Machine::Newest(wanted.family),
        template: Some(from),
        all_pools: BTreeSet::new(),
    };
    let only = wanted
        .host
        .as_ref()
        .map(|host| request::host(world, host))
        .transpose()?;
    let plan = placement::plan(world, &need, only.map(|host| host.id), |_| Vec::new());
    let host = placement::chosen(&plan, &need, Code::NoCapacity);
    Ok(Decided {
        template,
        network,
        subnet,
        ip,
        v6: world.networks.get(&network).and_then(|network| network.addressing.v6),
        disk_bytes,
        port,
        from,
        plan,
        host,
    })
}

/// What the VM will count in its project.
fn usage(wanted: &CreateVm, disk_bytes: Option<u64>) -> Usage {
    Usage {
        vms: 1,
        vcpus: u64::from(wanted.vcpus),
        memory_mib: wanted.memory_mib,
        disk_bytes: disk_bytes.unwrap_or(0),
    }
}

fn bounds(wanted: &CreateVm) -> Result<(), Box<Refusal>> {
    let invalid = |message: String, hint: &str| Err(refuse(Code::InvalidInput, message, hint));
    if !(1..=VCPUS_MAX).contains(&wanted.vcpus) {
        let message = format!("VM {}: {} vCPUs are not possible", wanted.name, wanted.vcpus);
        return invalid(message, "give it 1 to 64");
    }
    if !(MEMORY_MIN_MIB..=MEMORY_MAX_MIB).contains(&wanted.memory_mib) {
        let message = format!(
            "VM {}: {} MiB of memory are not possible",
            wanted.name, wanted.memory_mib
        );
        return invalid(message, "give it 64 to 1048576 MiB");
    }
    match wanted.disk_bytes {
        Some(bytes) if !(DISK_MIN..=DISK_MAX).contains(&bytes) => {
            let message = format!("VM {}: a disk of {bytes} bytes is not possible", wanted.name);
            invalid(message, "give it 1 MiB to 64 TiB")
        }
        // QEMU's block layer works in sectors.
        Some(bytes) if bytes % 512 != 0 => {
            let message = format!(
                "VM {}: a disk of {bytes} bytes is not a whole number of sectors",
                wanted.name
            );
            invalid(message, "give it a multiple of 512 bytes")
        }
        _ => Ok(()),
    }
}

/// What is for the guest itself: whether it can be told, and within bounds. User-data is never repeated in a message.
fn seed_bounds(wanted: &CreateVm, template: &Template) -> Result<(), Box<Refusal>> {
    let name = &wanted.name;
    let given = wanted.hostname.is_some() || !wanted.ssh_keys.is_empty() || wanted.user_data.is_some();
    if given && template.content.seed == Seed::None {
        let message = format!(
            "VM {name}: guests of template {} take no seed, so a host name, SSH keys or user-data would not reach them",
            template.name
        );
        let hint = "leave them out, or use a template that takes a seed: `godwit template build debian`, or `godwit template import --seed no-cloud`";
        return Err(refuse(Code::Incompatible, message, hint));
    }
    let invalid = |message: String, hint: &str| Err(refuse(Code::InvalidInput, message, hint));
    if wanted
        .hostname
        .as_deref()
        .is_some_and(|hostname| !seed::is_hostname(hostname))
    {
        return invalid(
            format!("VM {name}: the host name is none"),
            "use letters, digits, hyphens and dots, at most 63 between dots and 253 in all",
        );
    }
    let keys = wanted.ssh_keys.len();
    if keys > seed::SSH_KEYS_MAX {
        return invalid(format!("VM {name}: {keys} SSH keys are too many"), "give at most 32");
    }
    let checked = wanted.ssh_keys.iter().map(|key| seed::check_key(key));
    if let Some((at, Err(problem))) = checked.enumerate().find(|(_, checked)| checked.is_err()) {
        let message = format!("VM {name}: SSH key {} {problem}", at + 1);
        return invalid(message, "give one line as in a .pub file");
    }
    let bytes = wanted.user_data.as_ref().map_or(0, |data| data.expose().len());
    if bytes > seed::USER_DATA_BYTES_MAX {
        let message = format!("VM {name}: {bytes} bytes of user-data are too many");
        return invalid(message, "give at most 65536, and let it fetch the rest");
    }
    Ok(())
}

/// What the guest is told of itself.
fn guest_seed(wanted: &CreateVm) -> GuestSeed {
    GuestSeed {
        hostname: wanted.hostname.clone().unwrap_or_else(|| wanted.name.to_string()),
        ssh_keys: wanted.ssh_keys.clone(),
        user_data: wanted.user_data.clone(),
    }
}

fn ready(template: &Template) -> Result<(), Box<Refusal>> {
    let state = match &template.state {
        TemplateState::Ready { .. } => return Ok(()),
        TemplateState::Importing => "is still being imported",
        TemplateState::Failed { .. } => "could not be imported",
        TemplateState::Deleting => "is being deleted",
    };
    let message = format!("template {} {state}", template.name);
    Err(refuse(
        Code::WrongState,
        message,
        "`godwit template list` shows those that are ready",
    ))
}

fn disk(wanted: &CreateVm, template: &Template) -> Result<Option<u64>, Box<Refusal>> {
    if wanted.memory_mib < template.content.memory_mib_min {
        let least = template.content.memory_mib_min;
        let message = format!("template {} needs {least} MiB of memory", template.name);
        return Err(refuse(
            Code::InvalidInput,
            message,
            format!("give {} {least} MiB", wanted.name),
        ));
    }
    match (template.content.disk, wanted.disk_bytes) {
        (Some(disk), Some(bytes)) if bytes < disk.size_bytes => {
            let message = format!(
                "template {}'s disk has {} bytes, {bytes} is less",
                template.name, disk.size_bytes
            );
            Err(refuse(
                Code::InvalidInput,
                message,
                "leave the size out, or give at least the template's",
            ))
        }
        (Some(disk), bytes) => Ok(Some(bytes.unwrap_or(disk.size_bytes))),
        (None, None) if template.content.boot == Boot::Bios => {
            let message = format!("template {} starts from a disk and brings none", template.name);
            Err(refuse(Code::InvalidInput, message, "give the VM a disk"))
        }
        (None, bytes) => Ok(bytes),
    }
}

fn address(
    world: &World,
    request: &Request,
    wanted: &CreateVm,
) -> Result<(NetworkId, SubnetId, Ipv4Addr), Box<Refusal>> {
    let project = request.actor.project;
    let default = || model::name::Reference::Name("default".parse().expect("`default` is a name"));
    let reference = wanted.network.clone().unwrap_or_else(default);
    let network = projects::network(world, project, &reference).and_then(|id| world.networks.get(&id));
    let network = network.ok_or_else(|| {
        let message = format!("there is no network {reference} in this project");
        refuse(Code::NotFound, message, "leave the network out to use `default`")
    })?;
    let subnets = world
        .index
        .subnets
        .range((network.id, SubnetId(crate::world::uuid_min()))..);
    let mut subnets = subnets.take_while(|(of, _)| *of == network.id);
    subnets
        .find_map(|&(_, subnet)| Some((network.id, subnet, world.index.free.get(&subnet)?.lowest()?)))
        .ok_or_else(|| {
            let message = format!("network {} has no free address", network.name);
            refuse(
                Code::NoCapacity,
                message,
                "delete VMs; their addresses rest for a minute",
            )
        })
}

fn named_pool(world: &World, reference: &model::name::Reference) -> Result<PoolId, Box<Refusal>> {
    let id = match reference {
        model::name::Reference::Id(id) => Some(PoolId(*id)),
        model::name::Reference::Name(name) => world.index.pool_names.get(name).copied(),
    };
    id.filter(|id| world.pools.contains_key(id)).ok_or_else(|| {
        let message = format!("there is no pool {reference} in this cell");
        refuse(Code::NotFound, message, "leave the pool out to let it be chosen")
    })
}

/// A port with the next of the fresh ids whose Ethernet address nobody has.
fn port(
    world: &World,
    fresh: &mut Fresh<'_>,
    request: &Request,
    decided: &Decided<'_>,
    vm: VmId,
) -> Result<Port, Box<Refusal>> {
    let id = loop {
        let id: PortId = fresh.next()?;
        if !world.index.macs.contains_key(&Mac::of_port(id)) && !world.ports.contains_key(&id) {
            break id;
        }
    };
    Ok(Port {
        id,
        project: request.actor.project,
        network: decided.network,
        subnet: decided.subnet,
        mac: Mac::of_port(id),
        ip: decided.ip,
        v6: decided.v6.map(|prefix| prefix.address_of(Mac::of_port(id))),
        vm: Some(vm),
        bound: None,
        generation: Generation(0),
        rests_until: None,
        spec: Box::new(decided.port.clone()),
        applied: Revision(0),
    })
}

/// The first volume: an overlay of the template's disk, or a blank one if a size was given.
fn volume(
    fresh: &mut Fresh<'_>,
    request: &Request,
    decided: &Decided<'_>,
    vm: VmId,
    pool: PoolId,
) -> Result<Option<Volume>, Box<Refusal>> {
    let Some(size_bytes) = decided.disk_bytes else {
        return Ok(None);
    };
    Ok(Some(Volume {
        id: fresh.next::<VolumeId>()?,
        project: request.actor.project,
        pool,
        format: Format::Qcow2,
        size_bytes,
        base: decided.template.content.disk.map(|disk| disk.blob.digest),
        owner: Some(vm),
        generation: Generation(0),
    }))
}

#[allow(
    clippy::too_many_arguments,
    reason = "a row has many columns, and each is decided elsewhere"
)]
fn row_of(
    txn: &Txn<'_>,
    request: &Request,
    wanted: &CreateVm,
    decided: &Decided<'_>,
    host: &Host,
    id: VmId,
    port: &Port,
    volume: Option<&Volume>,
) -> Result<Vm, Box<Refusal>> {
    let hypervisor = host.status.facts.as_ref().map(|facts| &facts.hypervisor);
    let volumes: Vec<VolumeId> = volume.map(|volume| volume.id).into_iter().collect();
    let fix = |hypervisor| {
        let (vcpus, memory) = (wanted.vcpus, wanted.memory_mib);
        let layout = Layout::fix(wanted.family, hypervisor, vcpus, memory, &[port.id], &volumes)?;
        Some(match decided.template.content.seed {
            Seed::None => layout,
            Seed::NoCloud => layout.with_seed(),
        })
    };
    let layout = hypervisor.and_then(fix).ok_or_else(|| {
        let message = format!("host {} has no machine of family {}", host.name, wanted.family);
        refuse(Code::Incompatible, message, "choose another family")
    })?;
    Ok(Vm {
        id,
        project: request.actor.project,
        name: wanted.name.clone(),
        spec: VmSpec {
            template: decided.template.id,
            vcpus: wanted.vcpus,
            memory_mib: wanted.memory_mib,
            family: wanted.family,
            power: if wanted.start { Power::On } else { Power::Off },
        },
        revision: Revision(1),
        layout,
        ports: vec![port.id],
        volumes: volumes.clone(),
        status: VmStatus {
            state: VmState::Inactive,
            since: txn.now,
            reason: None,
            host: None,
            generation: Generation(0),
            highest: Generation(0),
            ordered: Revision(0),
            observed: Revision(0),
            moving: None,
            cleared: BTreeSet::new(),
        },
        operation: None,
        created_at: txn.now,
    })
}

fn write(txn: &mut Txn<'_>, vm: Vm, port: Port, volume: Option<Volume>, mut project: Project, more: Usage) {
    projects::add(&mut project.used, more);
    txn.put(Row::Project(project));
    txn.put(Row::Port(port));
    if let Some(volume) = volume {
        txn.put(Row::Volume(volume));
    }
    txn.put(Row::Vm(Box::new(vm.clone())));
    txn.notice_vm(&vm, "vm.created", String::new());
}
