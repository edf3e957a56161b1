//! Asking for a move: is it possible, to where, under which terms. What follows is in [`crate::moves`].

use model::{
    Code, Host, HostId, Millis, OperationKind, OperationState, Outcome, Plan, Refusal, Request, Stage, Terms, Vm, VmId,
    VmState, migration::Migration, name::Reference, order::Verb,
};

use crate::{
    definition, lifecycle,
    placement::{self, Need},
    request::{self, Decision, Fresh, refuse},
    templates,
    txn::Txn,
    world::World,
};

/// How long a move may take before the source, if it has not released, gives up.
const DEADLINE: Millis = Millis::seconds(600);
/// How long the destination waits for the other half before it declines.
const SETTLE: Millis = Millis::seconds(10);
/// How long the operation waits beyond both for the agents' words.
const MARGIN: Millis = Millis::seconds(60);
/// The migration capability without which the source believes to be done while the destination is still loading.
const NEEDED: &str = "return-path";

/// Moves a VM while it runs: stage PreMigration, and the order that begins Reservation.
pub(crate) fn request(txn: &mut Txn<'_>, request: &Request, of: &Reference, to: Option<&Reference>) -> Decision {
    let world = txn.world();
    let vm = request::current_vm(world, request, of)?;
    request::free(world, vm)?;
    if !matches!(vm.status.state, VmState::Active | VmState::Paused) {
        let hint = format!(
            "only an active or paused VM moves; one that is off may start elsewhere: `godwit vm start {}`",
            vm.name
        );
        return Err(lifecycle::wrong(vm, "migrate", &hint));
    }
    let source = lifecycle::reachable(world, vm)?;
    let to = to.map(|reference| request::host(world, reference)).transpose()?;
    let need = Need::of(world, vm);
    let plan = plan(world, vm, source, &need, to.map(|host| host.id));
    if request.dry_run {
        return Ok(Outcome::Plan(plan));
    }
    let code = match to {
        Some(host) if !lifecycle::is_up(world, host.id) => Code::HostUnreachable,
        Some(_) => Code::Incompatible,
        None => Code::NoCapacity,
    };
    let destination = placement::chosen(&plan, &need, code)?;
    let operation = Fresh::of(request).operation(world)?;
    let terms = terms(world, vm, source, destination, operation)?;
    begin(txn, request, vm.id, terms);
    request::outcome(txn, operation)
}

/// Every host, or the one that was named, with all that speaks against it.
fn plan(world: &World, vm: &Vm, source: HostId, need: &Need, only: Option<HostId>) -> Plan {
    placement::plan(world, need, only, |host| {
        let mut refused = Vec::new();
        if host.id == source {
            let next = match world.hosts().count() {
                1 => "this cell has no other host",
                _ => "choose another host",
            };
            refused.push(format!("{} is on {} already; {next}", vm.name, host.name));
            return refused;
        }
        refused.extend(capability(world, source, host));
        let named = vm
            .status
            .moving
            .as_ref()
            .is_some_and(|terms| [terms.source, terms.destination].contains(&host.id));
        if named && !vm.status.cleared.contains(&host.id) {
            refused.push(format!(
                "{} has not yet cleared away an earlier move of {}; wait until it has, or choose another host",
                host.name, vm.name
            ));
        }
        refused
    })
}

/// Both ends must know the capabilities that a hand-over needs.
fn capability(world: &World, source: HostId, destination: &Host) -> Option<String> {
    let known = |host: &Host| {
        let facts = host.status.facts.as_ref()?;
        Some(facts.hypervisor.migration.contains(NEEDED))
    };
    let lacking = [world.host(source), Some(destination)].into_iter().flatten();
    let lacking = lacking
        .filter(|host| known(host) == Some(false))
        .map(|host| host.name.as_str())
        .next()?;
    Some(format!(
        "{lacking}'s hypervisor has no migration capability {NEEDED}; install QEMU 7.2 or newer there"
    ))
}

fn terms(
    world: &World,
    vm: &Vm,
    source: HostId,
    destination: HostId,
    operation: model::OperationId,
) -> Result<Terms, Box<Refusal>> {
    let boot = |id: HostId| {
        let facts = world.host(id).and_then(|host| host.status.facts.as_ref());
        facts.map(|facts| facts.boot).ok_or_else(|| {
            let message = format!("nothing is known of {} yet", lifecycle::host_name(world, id));
            refuse(
                Code::HostUnreachable,
                message,
                "wait until its agent has told what it offers",
            )
        })
    };
    let granted = vm.status.highest.next();
    Ok(Terms {
        vm: vm.id,
        operation,
        source,
        source_boot: boot(source)?,
        destination,
        destination_boot: boot(destination)?,
        held: vm.status.generation,
        granted,
        reclaimed: granted.next(),
        run: vm.status.state != VmState::Paused,
        deadline: DEADLINE,
        settle: SETTLE,
    })
}

/// Writes the intent down, reserves, and tells the destination to prepare.
fn begin(txn: &mut Txn<'_>, request: &Request, id: VmId, terms: Terms) {
    let world = txn.world();
    let vm = world.vm(id).expect("a VM that was looked up in this step is there");
    let definition = definition::of(world, vm, terms.destination);
    let definition = Box::new(definition.expect("a host that was chosen has a pool for the template"));
    let (template, pool) = (vm.spec.template, definition.pool);
    let migration = Migration {
        terms: terms.clone(),
        stage: Stage::Reservation,
        entered: vec![(Stage::PreMigration, txn.now), (Stage::Reservation, txn.now)],
        reason: None,
        cancelling: false,
        receipt: None,
        stopped_at_ms: None,
        resumed_at_ms: None,
    };
    let allowed = Millis(DEADLINE.0 + SETTLE.0 + MARGIN.0);
    let kind = OperationKind::MigrateVm(Box::new(migration));
    let operation = request::begun(request, terms.operation, kind, request::vm_target(vm), txn.now, allowed);
    debug_assert_eq!(operation.state, OperationState::Running);
    txn.begin_operation(operation);
    txn.edit_vm(id, |vm| {
        vm.status.state = VmState::Migrating;
        vm.status.reason = None;
        vm.status.highest = terms.reclaimed;
        vm.status.moving = Some(terms.clone());
        vm.status.cleared.clear();
    });
    let (destination, operation) = (terms.destination, terms.operation);
    templates::bring(txn, template, pool, destination);
    txn.order(destination, id, operation, Verb::Receive { terms, definition });
}
