//! Reads of the committed world, in pages, within the actor's project.

use std::ops::Bound;

use model::{
    Actor, Code, Host, Operation, OperationId, PoolId, ProjectId, Refusal, Timestamp, Vm,
    query::{HostView, Listing, Named, NetworkView, OperationView, Page, Query, View, VmView},
};
use uuid::Uuid;

use crate::{
    capacity,
    request::{self, refuse},
    world::World,
};

impl World {
    /// Answers a query within the actor's project; hosts and pools belong to the cell and are seen by all.
    ///
    /// # Errors
    /// When a thing is not there, or a page's limit is out of bounds.
    pub fn query(&self, actor: &Actor, query: &Query, _now: Timestamp) -> Result<View, Box<Refusal>> {
        let project = actor.project;
        Ok(match query {
            Query::Vms(page) => {
                let ids = of(&self.index.vms, project, *page);
                View::Vms(listing(*page, ids, |id| self.vm(id).map(|vm| self.vm_view(vm)))?)
            }
            Query::Vm(reference) => View::Vm(Box::new(self.vm_view(request::vm(self, actor, reference)?))),
            Query::Hosts(page) => {
                let ids = after(&self.hosts, *page);
                View::Hosts(listing(*page, ids, |id| {
                    self.host(id).map(|host| self.host_view(host))
                })?)
            }
            Query::Host(reference) => View::Host(Box::new(self.host_view(request::host(self, reference)?))),
            Query::Templates(page) => {
                let ids = of(&self.index.templates, project, *page);
                View::Templates(listing(*page, ids, |id| self.template(id).cloned())?)
            }
            Query::Template(reference) => View::Template(Box::new(request::template(self, actor, reference)?.clone())),
            Query::Operations(page) => View::Operations(self.operations_page(project, *page)?),
            Query::Operation(id) => View::Operation(Box::new(self.operation_of(project, *id)?)),
            Query::Networks(page) => {
                let ids = of(&self.index.networks, project, *page);
                View::Networks(listing(*page, ids, |id| self.network_view(id))?)
            }
            Query::Pools(page) => {
                let ids = after(&self.pools, *page);
                View::Pools(listing(*page, ids, |id: PoolId| self.pools.get(&id).cloned())?)
            }
            Query::Volumes(page) => {
                let ids = of(&self.index.volumes, project, *page);
                View::Volumes(listing(*page, ids, |id| self.volumes.get(&id).cloned())?)
            }
        })
    }

    fn vm_view(&self, vm: &Vm) -> VmView {
        let host = vm.status.host.and_then(|id| self.host(id));
        let template = self.template(vm.spec.template);
        VmView {
            id: vm.id,
            name: vm.name.clone(),
            spec: vm.spec.clone(),
            revision: vm.revision,
            status: vm.status.clone(),
            host: host.map(|host| Named {
                id: host.id,
                name: host.name.clone(),
            }),
            host_lost: host.is_some_and(|host| host.status.link == model::host::Link::Lost),
            template: template.map(|template| Named {
                id: template.id,
                name: template.name.clone(),
            }),
            ports: vm.ports.iter().filter_map(|id| self.ports.get(id).cloned()).collect(),
            volumes: vm
                .volumes
                .iter()
                .filter_map(|id| self.volumes.get(id).cloned())
                .collect(),
            layout: vm.layout.clone(),
            operation: vm.operation,
            created_at: vm.created_at,
        }
    }

    fn host_view(&self, host: &Host) -> HostView {
        HostView {
            host: host.clone(),
            vms: self.held(host.id).vms,
            vcpus: capacity::vcpus(self, host),
            memory_mib: capacity::memory_mib(self, host),
        }
    }

    fn network_view(&self, id: model::NetworkId) -> Option<NetworkView> {
        let subnets = self.index.subnets.range((id, model::SubnetId(Uuid::nil()))..);
        let subnets = subnets.take_while(|(of, _)| *of == id);
        Some(NetworkView {
            network: self.networks.get(&id)?.clone(),
            subnets: subnets
                .filter_map(|(_, subnet)| self.subnets.get(subnet).cloned())
                .collect(),
            addresses_used: self.index.addresses_used.get(&id).copied().unwrap_or_default(),
        })
    }

    fn operation_view(&self, operation: &Operation) -> OperationView {
        OperationView {
            operation: operation.clone(),
            progress: self.transient.progress.get(&operation.id).cloned(),
        }
    }

    fn operation_of(&self, project: ProjectId, id: OperationId) -> Result<OperationView, Box<Refusal>> {
        let operation = self.operation(id).filter(|operation| operation.project == project);
        operation
            .map(|operation| self.operation_view(operation))
            .ok_or_else(|| {
                let message = format!("there is no operation {id} in this project");
                refuse(Code::NotFound, message, "`godwit op list` shows those that are kept")
            })
    }

    /// The newest first: ids grow with time.
    fn operations_page(&self, project: ProjectId, page: Page) -> Result<Listing<OperationView>, Box<Refusal>> {
        let first = Bound::Included((project, OperationId(Uuid::nil())));
        let last = match page.after {
            Some(id) => Bound::Excluded((project, OperationId(id))),
            None => Bound::Included((project, OperationId(Uuid::max()))),
        };
        let empty = page.after == Some(Uuid::nil());
        let ids = (!empty).then(|| self.index.operations.range((first, last)).rev().map(|(_, id)| *id));
        let ids = ids.into_iter().flatten();
        listing(page, ids, |id| {
            self.operation(id).map(|operation| self.operation_view(operation))
        })
    }
}

/// The ids of a project after a page's mark.
fn of<T: Ord + Copy + From<Uuid> + 'static>(
    index: &std::collections::BTreeSet<(ProjectId, T)>,
    project: ProjectId,
    page: Page,
) -> impl Iterator<Item = T> + '_ {
    let first = match page.after {
        Some(id) => Bound::Excluded((project, T::from(id))),
        None => Bound::Included((project, T::from(Uuid::nil()))),
    };
    let ids = index.range((first, Bound::Unbounded));
    ids.take_while(move |(of, _)| *of == project).map(|(_, id)| *id)
}

/// The ids of the cell after a page's mark.
fn after<T: Ord + Copy + From<Uuid> + 'static, V>(
    rows: &std::collections::BTreeMap<T, V>,
    page: Page,
) -> impl Iterator<Item = T> + '_ {
    let first = page.after.map_or(Bound::Unbounded, |id| Bound::Excluded(T::from(id)));
    rows.range((first, Bound::Unbounded)).map(|(id, _)| *id)
}

/// One page: as many as its limit allows, and the mark of the last if more follow.
fn listing<I: Copy + Into<Uuid>, T>(
    page: Page,
    ids: impl Iterator<Item = I>,
    row: impl Fn(I) -> Option<T>,
) -> Result<Listing<T>, Box<Refusal>> {
    if !(1..=Page::LIMIT_MAX).contains(&page.limit) {
        let message = format!("a page of {} is not possible", page.limit);
        return Err(refuse(Code::InvalidInput, message, "ask for 1 to 1000"));
    }
    let mut ids = ids.peekable();
    let mut items = Vec::new();
    let mut last = None;
    for id in ids.by_ref().take(page.limit) {
        items.extend(row(id));
        last = Some(id.into());
    }
    let next = if ids.peek().is_some() { last } else { None };
    Ok(Listing { items, next })
}
