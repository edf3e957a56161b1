//! Requests: who may ask, what is meant, whether it was asked before; then the verb decides.

use model::{
    Actor, AuditEntry, Code, Command, Host, Millis, Name, Operation, OperationId, OperationKind, OperationState,
    Outcome, Plan, Refusal, Request, Role, Row, Template, Timestamp, Vm, VmId,
    audit::AuditResult,
    change::Answer,
    command::IdempotencyKey,
    name::Reference,
    operation::{Target, TargetKind},
};
use uuid::Uuid;

use crate::{
    abandon, addressing, cancel, create, groups, hosts, lifecycle, migration, people, ports, projects, templates,
    txn::{Txn, target},
    world::World,
};

/// What a request leads to.
pub(crate) type Decision = Result<Outcome, Box<Refusal>>;

/// Longest idempotency key.
const KEY_MAX: usize = 255;

/// Decides a request and answers it.
pub(crate) fn handle(txn: &mut Txn<'_>, request: &Request) {
    let (answer, is_new) = match admit(txn, request) {
        Ok(Some(before)) => (Ok(Outcome::Operation(Box::new(before))), false),
        Ok(None) => (decide(txn, request), true),
        Err(refusal) => (Err(refusal), true),
    };
    debug_assert!(
        answer.is_ok() || txn.is_untouched(),
        "a refused request changes nothing"
    );
    if is_new && !request.dry_run {
        record(txn, request, &answer);
    }
    if let (Ok(Outcome::Operation(operation)), Some(key)) = (&answer, &request.key) {
        let at = txn.now;
        let known = txn.world().answers.get(&(request.actor.project, key.key.clone()));
        let known = known.filter(|known| known.operation == operation.id);
        txn.put(Row::Answer(Answer {
            project: request.actor.project,
            key: key.key.clone(),
            body_hash: key.body_hash,
            operation: operation.id,
            at: known.map_or(at, |answer| answer.at),
        }));
    }
    txn.reply(request.id, answer.map(Box::new));
}

/// Writes what was decided into the audit log, in the transaction of its effect.
fn record(txn: &mut Txn<'_>, request: &Request, answer: &Decision) {
    let (command, actor, now) = (&request.command, &request.actor, txn.now);
    let result = match (command, answer) {
        (Command::Note(note), Ok(_)) => match note.refused {
            Some(code) => AuditResult::Refused { code },
            None => AuditResult::Accepted { operation: None },
        },
        (_, Ok(Outcome::Operation(operation))) => AuditResult::Accepted {
            operation: Some(operation.id),
        },
        (_, Ok(_)) => AuditResult::Accepted { operation: None },
        (_, Err(refusal)) => AuditResult::Refused { code: refusal.code },
    };
    let mut entry = AuditEntry::of(actor, now, request.id.0, command.action(), command.target(), result);
    match command {
        Command::OpenSession { user, id, .. } => {
            entry.user = people::find(txn.world(), user).ok().map(|user| user.id);
            entry.token = Some(*id);
            entry.project = None;
        }
        Command::Note(note) if !note.in_project => entry.project = None,
        _ => {}
    }
    txn.put(Row::Audit(Box::new(entry)));
}

/// What the actor may do at this moment: what it came with may have been taken away since it was looked at.
fn role_now(txn: &Txn<'_>, actor: &Actor) -> Result<Role, Box<Refusal>> {
    let Some(id) = actor.via.token else {
        return Ok(actor.role);
    };
    let world = txn.world();
    let token = world.api_tokens.get(&id);
    let owner = token.and_then(|token| token.owner).and_then(|id| world.user(id));
    let role = token.and_then(|token| token.role_in(actor.project, owner, txn.now));
    role.map(|role| role.min(actor.role)).ok_or_else(|| {
        let message = format!("the token of {} is no longer valid here", actor.subject);
        refuse(Code::Unauthenticated, message, "log in again: `godwit login`")
    })
}

/// The refusal of what a role does not allow.
pub(crate) fn forbidden(actor: &Actor, role: Role, needs: Role) -> Box<Refusal> {
    let message = format!(
        "{} may not do this: its role here is {role}, {needs} is needed",
        actor.subject
    );
    refuse(
        Code::Forbidden,
        message,
        "use a token with that role, or ask for the role",
    )
}

/// Whether the actor may, and the operation of the same request if it was made before.
fn admit(txn: &Txn<'_>, request: &Request) -> Result<Option<Operation>, Box<Refusal>> {
    let (world, actor, needs) = (txn.world(), &request.actor, request.command.needs());
    let role = role_now(txn, actor)?;
    if role < needs {
        return Err(forbidden(actor, role, needs));
    }
    if !world.projects.contains_key(&actor.project) {
        return Err(refuse(
            Code::NotFound,
            "the token's project does not exist",
            "use another token",
        ));
    }
    let Some(key) = request.key.as_ref().filter(|_| !request.dry_run) else {
        return Ok(None);
    };
    if key.key.is_empty() || key.key.len() > KEY_MAX || !key.key.bytes().all(|b| b.is_ascii_graphic()) {
        let message = "the idempotency key is not 1 to 255 visible ASCII characters";
        return Err(refuse(Code::InvalidInput, message, "send a random UUID"));
    }
    match world.answers.get(&(actor.project, key.key.clone())) {
        Some(known) => replayed(known, key, world.operation(known.operation)).map(Some),
        None => Ok(None),
    }
}

/// What a request with an idempotency key that was used within [`ANSWER_KEPT`](crate::ANSWER_KEPT) led to.
///
/// # Errors
/// `KeyReused`, when the key stands for another request or what it led to is no longer kept.
pub fn replayed(
    known: &Answer,
    key: &IdempotencyKey,
    operation: Option<&Operation>,
) -> Result<Operation, Box<Refusal>> {
    match operation {
        _ if known.body_hash != key.body_hash => Err(refuse(
            Code::KeyReused,
            "the idempotency key was used for another request within a day",
            "send a fresh key with each new request",
        )),
        Some(operation) => Ok(operation.clone()),
        None => Err(refuse(
            Code::KeyReused,
            "the idempotency key was used, and what it led to is no longer kept",
            "look at the thing itself; send a fresh key to ask again",
        )),
    }
}

/// Whether a command is about a thing whose revision people can read.
const fn has_revision(command: &Command) -> bool {
    matches!(
        command,
        Command::StartVm(_)
            | Command::StopVm { .. }
            | Command::KillVm(_)
            | Command::RebootVm(_)
            | Command::PauseVm(_)
            | Command::ResumeVm(_)
            | Command::DeleteVm(_)
            | Command::MigrateVm { .. }
    )
}

fn decide(txn: &mut Txn<'_>, request: &Request) -> Decision {
    if request.expect.is_some() && !has_revision(&request.command) {
        let message = "what is asked for has no revision that could be compared";
        return Err(refuse(
            Code::InvalidInput,
            message,
            "leave If-Match out: only VMs have an ETag",
        ));
    }
    match &request.command {
        Command::CreateVm(wanted) => create::vm(txn, request, wanted),
        Command::StartVm(vm) => lifecycle::start(txn, request, vm),
        Command::StopVm { vm, grace } => lifecycle::stop(txn, request, vm, *grace),
        Command::KillVm(vm) => lifecycle::kill(txn, request, vm),
        Command::RebootVm(vm) => lifecycle::reboot(txn, request, vm),
        Command::PauseVm(vm) => lifecycle::pause(txn, request, vm),
        Command::ResumeVm(vm) => lifecycle::resume(txn, request, vm),
        Command::DeleteVm(vm) => lifecycle::delete(txn, request, vm),
        Command::MigrateVm { vm, to } => migration::request(txn, request, vm, to.as_ref()),
        Command::CancelOperation(operation) => cancel::operation(txn, request, *operation),
        Command::AddJoinToken(token) => hosts::add_token(txn, request, token),
        Command::JoinHost { token, host, name } => hosts::join(txn, request, *token, *host, name),
        Command::SetSchedulable { host, schedulable } => hosts::set_schedulable(txn, request, host, *schedulable),
        Command::RemoveHost(host) => hosts::remove(txn, request, host),
        Command::AbandonHost(host) => abandon::host(txn, request, host),
        Command::CreateTemplate { name, content } => templates::create(txn, request, name, content),
        Command::DeleteTemplate(template) => templates::delete(txn, request, template),
        Command::CreateProject { name, quota } => projects::create(txn, request, name, *quota),
        Command::DeleteProject(project) => projects::delete(txn, request, project),
        Command::SetQuota { project, quota } => projects::set_quota(txn, request, project, *quota),
        Command::SetAddressing { network, addressing } => addressing::set(txn, request, network, addressing),
        Command::CreateUser { name, password } => people::create(txn, request, name, password),
        Command::SetPassword { user, password } => people::set_password(txn, request, user, password),
        Command::SetUserDisabled { user, disabled } => people::set_disabled(txn, request, user, *disabled),
        Command::DeleteUser(user) => people::delete(txn, request, user),
        Command::Grant { user, role } => people::grant(txn, request, user, *role),
        Command::Revoke { user, cloud_admin } => people::revoke(txn, request, user, *cloud_admin),
        Command::CreateToken(token) => people::create_token(txn, request, token),
        Command::RevokeToken(token) => people::revoke_token(txn, request, *token),
        Command::OpenSession {
            user,
            password,
            id,
            hash,
            valid,
        } => people::open_session(txn, request, user, password, (*id, *hash, *valid)),
        Command::CreateSecurityGroup { name } => groups::create(txn, request, name),
        Command::DeleteSecurityGroup(group) => groups::delete(txn, request, group),
        Command::AddSecurityRule { group, rule } => groups::add_rule(txn, request, group, rule),
        Command::RemoveSecurityRule { group, number } => groups::remove_rule(txn, request, group, *number),
        Command::SetPort { port, change } => ports::set(txn, request, port, change),
        Command::Note(_) => Ok(Outcome::Done),
    }
}

/// A refusal with a hint, boxed.
pub(crate) fn refuse(code: Code, message: impl Into<String>, hint: impl Into<String>) -> Box<Refusal> {
    Box::new(Refusal::new(code, message).hint(hint))
}

fn not_found(kind: &str, reference: &Reference) -> Box<Refusal> {
    let called = if kind == "vm" { "VM" } else { kind };
    let message = format!("there is no {called} {reference} in this project");
    refuse(
        Code::NotFound,
        message,
        format!("`godwit {kind} list` shows what there is"),
    )
}

/// The VM that is meant, in the actor's project.
pub(crate) fn vm<'w>(world: &'w World, actor: &Actor, reference: &Reference) -> Result<&'w Vm, Box<Refusal>> {
    let id = match reference {
        Reference::Id(id) => Some(VmId(*id)),
        Reference::Name(name) => world.index.vm_names.get(&(actor.project, name.clone())).copied(),
    };
    id.and_then(|id| world.vm(id))
        .filter(|vm| vm.project == actor.project)
        .ok_or_else(|| not_found("vm", reference))
}

/// The template that is meant, in the actor's project.
pub(crate) fn template<'w>(
    world: &'w World,
    actor: &Actor,
    reference: &Reference,
) -> Result<&'w Template, Box<Refusal>> {
    let id = match reference {
        Reference::Id(id) => Some(model::TemplateId(*id)),
        Reference::Name(name) => world.index.template_names.get(&(actor.project, name.clone())).copied(),
    };
    id.and_then(|id| world.template(id))
        .filter(|template| template.project == actor.project)
        .ok_or_else(|| not_found("template", reference))
}

/// The host that is meant.
pub(crate) fn host<'w>(world: &'w World, reference: &Reference) -> Result<&'w Host, Box<Refusal>> {
    let id = match reference {
        Reference::Id(id) => Some(model::HostId(*id)),
        Reference::Name(name) => world.index.host_names.get(name).copied(),
    };
    id.and_then(|id| world.host(id)).ok_or_else(|| {
        let message = format!("there is no host {reference} in this cell");
        refuse(Code::NotFound, message, "`godwit host list` shows what there is")
    })
}

/// The VM that is meant, if it still has the revision that the client read.
pub(crate) fn current_vm<'w>(
    world: &'w World,
    request: &Request,
    reference: &Reference,
) -> Result<&'w Vm, Box<Refusal>> {
    let vm = vm(world, &request.actor, reference)?;
    match request.expect {
        Some(expected) if expected != vm.revision => {
            let message = format!(
                "VM {} was changed: its revision is {}, not {expected}",
                vm.name, vm.revision
            );
            Err(refuse(Code::Stale, message, "read it again and decide anew"))
        }
        _ => Ok(vm),
    }
}

/// Refuses when an operation holds the VM.
pub(crate) fn free(world: &World, vm: &Vm) -> Result<(), Box<Refusal>> {
    match vm
        .operation
        .and_then(|id| world.operation(id))
        .filter(|held| !held.state.is_over())
    {
        None => Ok(()),
        Some(held) => {
            let message = format!("VM {} is held by operation {} {}", vm.name, held.kind.name(), held.id);
            let hint = format!(
                "wait for it: `godwit op wait {0}`, or give it up: `godwit op cancel {0}`",
                held.id
            );
            Err(refuse(Code::Busy, message, hint))
        }
    }
}

/// The fresh ids that a request brings, each given once.
pub(crate) struct Fresh<'r>(std::slice::Iter<'r, Uuid>);

impl<'r> Fresh<'r> {
    pub(crate) fn of(request: &'r Request) -> Self {
        Self(request.fresh.iter())
    }

    pub(crate) fn next<T: From<Uuid>>(&mut self) -> Result<T, Box<Refusal>> {
        let id = self.0.next().copied();
        id.map(T::from).ok_or_else(|| {
            let message = format!("the request brings fewer than {} fresh ids", Request::FRESH);
            refuse(
                Code::InvalidInput,
                message,
                "send it through the controller's interface",
            )
        })
    }

    /// An operation's id, which no operation has.
    pub(crate) fn operation(&mut self, world: &World) -> Result<OperationId, Box<Refusal>> {
        loop {
            let id: OperationId = self.next()?;
            if !world.operations.contains_key(&id) {
                return Ok(id);
            }
        }
    }
}

/// An operation that begins now.
pub(crate) fn begun(
    request: &Request,
    id: OperationId,
    kind: OperationKind,
    target: Target,
    now: Timestamp,
    allowed: Millis,
) -> Operation {
    Operation {
        id,
        project: request.actor.project,
        subject: request.actor.subject.clone(),
        kind,
        target,
        state: OperationState::Running,
        created_at: now,
        finished_at: None,
        ends_by: now.after(allowed),
    }
}

/// A VM as a target.
pub(crate) fn vm_target(vm: &Vm) -> Target {
    target(TargetKind::Vm, vm.id.0, &vm.name)
}

/// Records an operation that had nothing to do, or was done at once.
pub(crate) fn done(
    txn: &mut Txn<'_>,
    request: &Request,
    id: OperationId,
    kind: OperationKind,
    target: Target,
) -> Decision {
    let mut operation = begun(request, id, kind, target, txn.now, Millis(0));
    operation.state = OperationState::Succeeded;
    operation.finished_at = Some(txn.now);
    txn.begin_operation(operation.clone());
    Ok(Outcome::Operation(Box::new(operation)))
}

/// The outcome of an operation that was begun, as it is now.
pub(crate) fn outcome(txn: &Txn<'_>, id: OperationId) -> Decision {
    let operation = txn.world().operation(id).cloned();
    let operation = operation.expect("an operation that was begun in this step is there");
    Ok(Outcome::Operation(Box::new(operation)))
}

/// The plan of a verb that places nothing: it is legal, and the VM stays where it is.
pub(crate) fn stays(world: &World, vm: &Vm) -> Decision {
    let host = vm.status.host.and_then(|id| world.host(id));
    Ok(Outcome::Plan(Plan {
        vm: Some(vm.id),
        host: host.map(|host| host.id),
        host_name: host.map(|host| host.name.clone()),
        hosts: Vec::new(),
    }))
}

/// A name that is free in an index: the wish, or with the lowest suffix from 2 that is free.
pub(crate) fn unique(wish: &Name, taken: impl Fn(&Name) -> bool) -> Name {
    if !taken(wish) {
        return wish.clone();
    }
    (2u64..)
        .filter_map(|n| {
            let suffix = format!("-{n}");
            let stem: String = wish.as_str().chars().take(63 - suffix.len()).collect();
            format!("{}{suffix}", stem.trim_end_matches('-')).parse().ok()
        })
        .find(|name| !taken(name))
        .expect("one of all suffixes is free")
}
