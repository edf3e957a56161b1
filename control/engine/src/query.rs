//! Reads of the committed world, in pages, within the actor's project.

use std::ops::Bound;

use model::{
    Actor, Code, Host, NetworkId, Operation, OperationId, PoolId, Port, Project, ProjectId, Refusal, Role,
    SecurityGroup, SecurityGroupId, Timestamp, TokenId, User, UserId, Vm,
    access::ApiToken,
    name::Reference,
    policy::Remote,
    query::{
        GrantView, HostView, Listing, Named, NetworkView, OperationView, Page, PortView, Query, SecurityGroupView,
        TokenView, UserView, View, VmView,
    },
};
use uuid::Uuid;

use crate::{
    capacity, groups, people, ports, projects,
    request::{self, refuse},
    world::World,
};

impl World {
    /// Answers a query within the actor's project; hosts and pools belong to the cell and are seen by all.
    ///
    /// # Errors
    /// When a thing is not there, or a page's limit is out of bounds.
    // tidy: long because it is the list of all queries.
    pub fn query(&self, actor: &Actor, query: &Query, _now: Timestamp) -> Result<View, Box<Refusal>> {
        let project = actor.project;
        if actor.role < query.needs() {
            return Err(request::forbidden(actor, actor.role, query.needs()));
        }
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
                let own = of(&self.index.networks, project, *page);
                let shared = projects::shared_network(self, project);
                let shared = shared.filter(|id| page.after.is_none_or(|after| id.0 > after));
                let ids: std::collections::BTreeSet<NetworkId> = own.chain(shared).collect();
                View::Networks(listing(*page, ids.into_iter(), |id| self.network_view(id))?)
            }
            Query::Pools(page) => {
                let ids = after(&self.pools, *page);
                View::Pools(listing(*page, ids, |id: PoolId| self.pools.get(&id).cloned())?)
            }
            Query::Volumes(page) => {
                let ids = of(&self.index.volumes, project, *page);
                View::Volumes(listing(*page, ids, |id| self.volumes.get(&id).cloned())?)
            }
            Query::Projects(page) => {
                let ids = after(&self.projects, *page).filter(|id| self.has_role(actor, *id));
                View::Projects(listing(*page, ids, |id| self.project(id).cloned())?)
            }
            Query::Project(reference) => View::Project(Box::new(self.project_of(actor, reference)?)),
            Query::Users(page) => {
                let ids = after(&self.users, *page).filter(|id| self.sees_user(actor, *id));
                View::Users(listing(*page, ids, |id| {
                    self.user(id).map(|user| self.user_view(actor, user))
                })?)
            }
            Query::User(reference) => {
                let user = people::find(self, reference)?;
                if !self.sees_user(actor, user.id) {
                    return Err(people::unknown(reference));
                }
                View::User(Box::new(self.user_view(actor, user)))
            }
            Query::Tokens(page) => {
                let ids = self.index.service_tokens(project);
                let ids = ids.filter(|id| page.after.is_none_or(|after| id.0 > after));
                let token = |id: TokenId| self.api_tokens.get(&id).map(|token| self.token_view(token));
                View::Tokens(listing(*page, ids, token)?)
            }
            Query::OwnToken => {
                let token = actor.via.token.and_then(|id| self.api_tokens.get(&id));
                let token = token.ok_or_else(|| refuse(Code::NotFound, "no token was shown", ""))?;
                View::Token(Box::new(self.token_view(token)))
            }
            Query::Ports(page) => {
                let ids = of(&self.index.ports, project, *page);
                View::Ports(listing(*page, ids, |id| {
                    self.ports.get(&id).map(|port| self.port_view(port))
                })?)
            }
            Query::Port(reference) => View::Port(Box::new(self.port_view(ports::find(self, actor, reference)?))),
            Query::SecurityGroups(page) => {
                let ids = of(&self.index.security_groups, project, *page);
                let view = |id| {
                    self.security_groups
                        .get(&id)
                        .map(|group| self.security_group_view(group))
                };
                View::SecurityGroups(listing(*page, ids, view)?)
            }
            Query::SecurityGroup(reference) => {
                let group = groups::find(self, actor, reference)?;
                View::SecurityGroup(Box::new(self.security_group_view(group)))
            }
        })
    }

    fn port_view(&self, port: &Port) -> PortView {
        PortView {
            port: port.clone(),
            vm_name: port.vm.and_then(|id| self.vm(id)).map(|vm| vm.name.clone()),
            network_name: self.networks.get(&port.network).map(|network| network.name.clone()),
            host_name: port.bound.and_then(|id| self.host(id)).map(|host| host.name.clone()),
            security_groups: self.named_groups(port.spec.groups.iter()),
            in_force: !ports::is_pending(self, port),
            traffic: None,
        }
    }

    fn security_group_view(&self, group: &SecurityGroup) -> SecurityGroupView {
        let remotes = group.rules.iter().filter_map(|rule| match &rule.remote {
            Remote::Group(id) => Some(id),
            _ => None,
        });
        let remotes: std::collections::BTreeSet<_> = remotes.collect();
        SecurityGroupView {
            group: group.clone(),
            remote_groups: self.named_groups(remotes.into_iter()),
            ports: self.index.ports_in(group.id).count() as u64,
        }
    }

    fn named_groups<'i>(&self, ids: impl Iterator<Item = &'i SecurityGroupId>) -> Vec<Named<SecurityGroupId>> {
        let groups = ids.filter_map(|id| self.security_groups.get(id));
        let named = groups.map(|group| Named {
            id: group.id,
            name: group.name.clone(),
        });
        named.collect()
    }

    /// Whether an actor has a role in a project: all for a cloud admin; those of its user, as far as its token reaches.
    fn has_role(&self, actor: &Actor, project: ProjectId) -> bool {
        let token = actor.via.token.and_then(|id| self.api_tokens.get(&id));
        let owner = token.and_then(|token| token.owner).and_then(|id| self.user(id));
        let elsewhere = token.and_then(|token| token.role_in(project, owner, Timestamp(i64::MIN)));
        project == actor.project || actor.role == Role::CloudAdmin || elsewhere.is_some()
    }

    fn project_of(&self, actor: &Actor, reference: &Reference) -> Result<Project, Box<Refusal>> {
        let project = projects::named(self, reference);
        let seen = project.filter(|project| self.has_role(actor, project.id));
        seen.cloned().ok_or_else(|| projects::unknown(reference))
    }

    /// Whether an actor may know of a user: itself, as a project admin those with a role in the project, as a cloud admin all.
    fn sees_user(&self, actor: &Actor, user: UserId) -> bool {
        let here = || {
            self.user(user)
                .is_some_and(|user| user.grants.contains_key(&actor.project))
        };
        actor.role == Role::CloudAdmin || actor.via.user == Some(user) || (actor.role >= Role::ProjectAdmin && here())
    }

    fn user_view(&self, actor: &Actor, user: &User) -> UserView {
        let all = actor.role == Role::CloudAdmin || actor.via.user == Some(user.id);
        let seen = user
            .grants
            .iter()
            .filter(|(project, _)| all || **project == actor.project);
        UserView {
            id: user.id,
            name: user.name.clone(),
            cloud_admin: user.cloud_admin,
            grants: seen
                .filter_map(|(project, role)| {
                    let project = self.named_project(*project)?;
                    Some(GrantView { project, role: *role })
                })
                .collect(),
            disabled: user.disabled,
            created_at: user.created_at,
        }
    }

    fn token_view(&self, token: &ApiToken) -> TokenView {
        let owner = token.owner.and_then(|id| self.user(id));
        TokenView {
            id: token.id,
            name: token.name.clone(),
            kind: token.kind,
            subject: token.actor.subject.clone(),
            project: self.named_project(token.actor.project),
            role: token.actor.role,
            owner: owner.map(|owner| Named {
                id: owner.id,
                name: owner.name.clone(),
            }),
            created_by: token.created_by.clone(),
            created_at: token.created_at,
            expires_at: token.expires_at,
        }
    }

    fn named_project(&self, id: ProjectId) -> Option<Named<ProjectId>> {
        let name = self.project(id)?.name.clone();
        Some(Named { id, name })
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
            connected: self.transient.connected.contains(&host.id),
        }
    }

    fn network_view(&self, id: model::NetworkId) -> Option<NetworkView> {
        let resting = self.index.resting.iter().filter_map(|(_, port)| self.ports.get(port));
        let subnets = self.index.subnets.range((id, model::SubnetId(Uuid::nil()))..);
        let subnets = subnets.take_while(|(of, _)| *of == id);
        Some(NetworkView {
            network: self.networks.get(&id)?.clone(),
            subnets: subnets
                .filter_map(|(_, subnet)| self.subnets.get(subnet).cloned())
                .collect(),
            addresses_used: self.index.addresses_used.get(&id).copied().unwrap_or_default(),
            addresses_resting: resting.filter(|port| port.network == id).count() as u64,
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
