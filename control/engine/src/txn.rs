//! The one way in which the world changes: every change is applied to memory and recorded for the store in the same breath.

use std::collections::BTreeMap;

use model::{
    Change, Effect, Host, HostId, Key, Notice, Operation, OperationId, OperationState, Order, Outcome, Port, PortId,
    ProjectId, Refusal, RequestId, Row, Template, TemplateId, Timestamp, User, UserId, Vm, VmId, Volume, VolumeId,
    change::OutboxRow,
    operation::{Progress, Target, TargetKind},
    order::{Subject, Verb, VmOrder},
};
use uuid::Uuid;

use crate::world::World;

/// Most notices that are kept.
pub const NOTICES_MAX: usize = 10_000;

/// One step's changes, as they are made. What is changed twice is recorded once, as it is at the end.
pub(crate) struct Txn<'w> {
    world: &'w mut World,
    /// When the step takes place.
    pub(crate) now: Timestamp,
    changes: Vec<Change>,
    /// Where the change of a key is in `changes`.
    changed: BTreeMap<Key, usize>,
    others: Vec<Effect>,
}

impl<'w> Txn<'w> {
    pub(crate) fn begin(world: &'w mut World, now: Timestamp) -> Self {
        Self {
            world,
            now,
            changes: Vec::new(),
            changed: BTreeMap::new(),
            others: Vec::new(),
        }
    }

    /// The effects, changes first.
    pub(crate) fn end(self) -> Vec<Effect> {
        let changes = self.changes.into_iter().map(|change| Effect::Change(Box::new(change)));
        changes.chain(self.others).collect()
    }

    /// The world as changed so far.
    pub(crate) fn world(&self) -> &World {
        self.world
    }

    /// What is not stored.
    pub(crate) fn transient(&mut self) -> &mut crate::world::Transient {
        &mut self.world.transient
    }

    /// Whether nothing was changed yet: a refused request leaves it so.
    pub(crate) fn is_untouched(&self) -> bool {
        self.changes.is_empty()
    }

    fn record(&mut self, key: Key, change: Change) {
        match self.changed.get(&key) {
            Some(&at) => self.changes[at] = change,
            None => {
                self.changed.insert(key, self.changes.len());
                self.changes.push(change);
            }
        }
    }

    /// Puts a row; nothing happens when it is there as it stands.
    pub(crate) fn put(&mut self, row: Row) {
        if self.world.holds(&row) {
            return;
        }
        self.record(row.key(), Change::Put(row.clone()));
        self.world.insert(row);
    }

    /// Deletes a row, if it is there.
    pub(crate) fn delete(&mut self, key: Key) {
        if self.world.remove(&key).is_some() {
            self.record(key.clone(), Change::Delete(key));
        }
    }

    /// Changes a VM. A change of state is told to watchers.
    pub(crate) fn edit_vm(&mut self, id: VmId, edit: impl FnOnce(&mut Vm)) {
        let Some(old) = self.world.vms.get(&id) else { return };
        let (before, mut vm) = (old.status.state, old.clone());
        edit(&mut vm);
        let changed = vm.status.state != before;
        if changed {
            vm.status.since = self.now;
            let detail = vm.status.reason.clone().unwrap_or_default();
            self.notice_vm(&vm, &format!("vm.{}", vm.status.state), detail);
        }
        self.world.transient.dirty.insert(id);
        self.put(Row::Vm(vm));
    }

    /// Changes a host. A change of its link is told to watchers.
    pub(crate) fn edit_host(&mut self, id: HostId, edit: impl FnOnce(&mut Host)) {
        let Some(old) = self.world.hosts.get(&id) else { return };
        let mut host = old.clone();
        edit(&mut host);
        self.put(Row::Host(host));
    }

    /// Changes a template.
    pub(crate) fn edit_template(&mut self, id: TemplateId, edit: impl FnOnce(&mut Template)) {
        let Some(old) = self.world.templates.get(&id) else {
            return;
        };
        let mut template = old.clone();
        edit(&mut template);
        self.put(Row::Template(template));
    }

    /// Changes an operation that runs.
    pub(crate) fn edit_operation(&mut self, id: OperationId, edit: impl FnOnce(&mut Operation)) {
        let Some(old) = self.world.operations.get(&id) else {
            return;
        };
        let mut operation = old.clone();
        edit(&mut operation);
        self.put(Row::Operation(operation));
    }

    /// Changes a port.
    pub(crate) fn edit_port(&mut self, id: PortId, edit: impl FnOnce(&mut Port)) {
        let Some(mut port) = self.world.ports.get(&id).cloned() else {
            return;
        };
        edit(&mut port);
        self.put(Row::Port(port));
    }

    /// Changes a user.
    pub(crate) fn edit_user(&mut self, id: UserId, edit: impl FnOnce(&mut User)) {
        let Some(mut user) = self.world.users.get(&id).cloned() else {
            return;
        };
        edit(&mut user);
        self.put(Row::User(user));
    }

    /// Changes a volume.
    pub(crate) fn edit_volume(&mut self, id: VolumeId, edit: impl FnOnce(&mut Volume)) {
        let Some(mut volume) = self.world.volumes.get(&id).cloned() else {
            return;
        };
        edit(&mut volume);
        self.put(Row::Volume(volume));
    }

    /// Orders a host to do something with a VM, under the VM's present generation unless terms say another.
    pub(crate) fn order(&mut self, host: HostId, vm: VmId, operation: OperationId, verb: Verb) {
        let Some(row) = self.world.vms.get(&vm) else { return };
        let generation = match &verb {
            Verb::Receive { terms, .. } | Verb::Cancel { terms } if terms.destination == host => terms.granted,
            Verb::Send { terms, .. } | Verb::Cancel { terms } => terms.held,
            _ => row.status.generation,
        };
        let revision = row.status.ordered.next();
        let order = Order::Vm(Box::new(VmOrder {
            epoch: self.world.transient.epoch,
            vm,
            generation,
            revision,
            operation,
            verb,
        }));
        self.edit_vm(vm, |vm| vm.status.ordered = revision);
        self.send_kept(host, order);
    }

    /// Sends an order that the outbox keeps until it is answered.
    pub(crate) fn send_kept(&mut self, host: HostId, order: Order) {
        let row = OutboxRow {
            host,
            order: order.clone(),
        };
        self.put(Row::Outbox(Box::new(row)));
        let order = Box::new(self.world.seeded(order));
        self.others.push(Effect::Send(host, order));
    }

    /// Sends an order that nobody keeps: the sender repeats it.
    pub(crate) fn send(&mut self, host: HostId, order: Order) {
        self.others.push(Effect::Send(host, Box::new(order)));
    }

    /// Takes back the order about a VM that a host has not answered.
    pub(crate) fn withdraw(&mut self, host: HostId, vm: VmId) {
        self.delete(Key::Outbox(host, Subject::Vm(vm)));
    }

    /// Answers a request.
    pub(crate) fn reply(&mut self, request: RequestId, answer: Result<Box<Outcome>, Box<Refusal>>) {
        self.others.push(Effect::Reply(request, answer));
    }

    /// Tells watchers how far an operation is.
    pub(crate) fn progress(&mut self, operation: OperationId, project: ProjectId, progress: Progress) {
        self.world.transient.progress.insert(operation, progress.clone());
        self.others.push(Effect::Progress(operation, project, progress));
    }

    /// Adds to the stream of notices, and drops its oldest entry when it is full.
    pub(crate) fn notice(
        &mut self,
        what: &str,
        target: Target,
        project: Option<ProjectId>,
        operation: Option<OperationId>,
        detail: String,
    ) {
        let notice = Notice {
            sequence: self.world.last_sequence().next(),
            at: self.now,
            project,
            what: what.to_owned(),
            kind: target.kind,
            id: target.id,
            name: target.name,
            operation,
            detail,
        };
        self.put(Row::Notice(Box::new(notice)));
        if self.world.notices.len() > NOTICES_MAX {
            let oldest = self.world.first_sequence();
            self.delete(Key::Notice(oldest));
        }
    }

    /// A notice about a VM.
    pub(crate) fn notice_vm(&mut self, vm: &Vm, what: &str, detail: String) {
        let target = target(TargetKind::Vm, vm.id.0, &vm.name);
        self.notice(what, target, Some(vm.project), vm.operation, detail);
    }

    /// A notice about a host.
    pub(crate) fn notice_host(&mut self, host: HostId, what: &str, detail: String) {
        if let Some(host) = self.world.hosts.get(&host) {
            let target = target(TargetKind::Host, host.id.0, &host.name);
            self.notice(what, target, None, None, detail);
        }
    }

    /// A notice about a template.
    pub(crate) fn notice_template(&mut self, id: TemplateId, what: &str, detail: String) {
        if let Some(template) = self.world.templates.get(&id) {
            let project = template.project;
            let target = target(TargetKind::Template, id.0, &template.name);
            self.notice(what, target, Some(project), None, detail);
        }
    }

    /// Begins an operation, or records one that is already done; on a VM it holds the VM while it runs.
    pub(crate) fn begin_operation(&mut self, operation: Operation) {
        let (id, over) = (operation.id, operation.state.is_over());
        if operation.target.kind == TargetKind::Vm && !over {
            self.edit_vm(VmId(operation.target.id), |vm| vm.operation = Some(id));
        }
        let what = format!("operation.{}", operation.state.name());
        let (target, project) = (operation.target.clone(), operation.project);
        let detail = operation.kind.name().to_owned();
        self.put(Row::Operation(Box::new(operation)));
        self.notice(&what, target, Some(project), Some(id), detail);
    }

    /// Ends a running operation and frees its VM. One that is over stays as it ended.
    pub(crate) fn finish(&mut self, id: OperationId, state: OperationState) {
        let now = self.now;
        let Some(operation) = self.world.operation(id).filter(|op| !op.state.is_over()) else {
            return;
        };
        let (target, project) = (operation.target.clone(), operation.project);
        let detail = match &state {
            OperationState::Failed { reason } => format!("{}: {reason}", operation.kind.name()),
            _ => operation.kind.name().to_owned(),
        };
        let what = format!("operation.{}", state.name());
        self.edit_operation(id, |operation| {
            operation.state = state;
            operation.finished_at = Some(now);
        });
        self.world.transient.progress.remove(&id);
        if target.kind == TargetKind::Vm {
            self.edit_vm(VmId(target.id), |vm| {
                if vm.operation == Some(id) {
                    vm.operation = None;
                }
            });
        }
        self.notice(&what, target, Some(project), Some(id), detail);
    }

    /// Ends an operation that did not do it.
    pub(crate) fn fail(&mut self, id: OperationId, reason: Refusal) {
        self.finish(id, OperationState::Failed { reason });
    }

    /// The operation that holds a VM, if it runs.
    pub(crate) fn holding(&self, vm: VmId) -> Option<&Operation> {
        let id = self.world.vm(vm)?.operation?;
        self.world.operation(id).filter(|operation| !operation.state.is_over())
    }
}

/// What an operation or notice is about.
pub(crate) fn target(kind: TargetKind, id: Uuid, name: &model::Name) -> Target {
    let name = name.clone();
    Target { kind, id, name }
}
