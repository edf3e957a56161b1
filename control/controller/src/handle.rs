//! The edges' only way in: ask, submit, watch.

use std::sync::Arc;

use bytes::Bytes;
use engine::World;
use futures_util::Stream;
use identity::ApiToken;
use model::{
    Actor, Command, Digest, Operation, OperationId, Outcome, Refusal, Request, RequestId, Revision, Role, Sequence,
    Timestamp, TokenId, Via, VmId,
    access::TokenHash,
    change::Answer,
    command::IdempotencyKey,
    name::Reference,
    query::{Listing, OperationView, Page, Query, View, VmView},
    refusal::Code,
    template::Blob,
};
use sha2::{Digest as _, Sha256};
use tokio::{
    io::DuplexStream,
    sync::{mpsc, oneshot, watch},
};
use uuid::Uuid;
use wire::{Down, session::CONSOLE_TICKET_VALID};

use crate::{
    blobs::Blobs,
    clock::Clock,
    committed::Committed,
    consoles::Consoles,
    core::{Health, Input, read_only},
    joining::Authority,
    meters::Meters,
    metrics::Metrics,
    passwords::Passwords,
    storage::Storage,
    telemetry,
    watch::{WatchItem, watch},
};

/// How a request is made.
#[derive(Clone, Debug, Default)]
pub struct SubmitOptions {
    /// Makes a repeated request the same request.
    pub key: Option<IdempotencyKey>,
    /// Do it only if the thing still has this revision.
    pub expect: Option<Revision>,
    /// Say what would be done, and do nothing.
    pub dry_run: bool,
}

/// What all handles share.
pub(crate) struct Shared {
    pub(crate) inputs: mpsc::Sender<Input>,
    pub(crate) committed: Arc<Committed>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) blobs: Blobs,
    pub(crate) consoles: Arc<Consoles>,
    pub(crate) authority: Arc<Authority>,
    pub(crate) storage: Arc<dyn Storage>,
    pub(crate) health: watch::Receiver<Health>,
    pub(crate) clock: Arc<Clock>,
    pub(crate) passwords: Passwords,
    pub(crate) telemetry: Arc<telemetry::Store>,
    pub(crate) meters: Arc<Meters>,
}

/// The edges' only way in. Cheap to clone.
#[derive(Clone)]
pub struct Handle(pub(crate) Arc<Shared>);

impl std::fmt::Debug for Handle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Handle(..)")
    }
}

impl Handle {
    /// Asks for something. Returns when it is committed, or refused; slow work goes on as an operation.
    ///
    /// # Errors
    /// The engine's refusal; `Overloaded` at once when too much waits; `ReadOnly` when nothing can be stored.
    pub async fn submit(&self, actor: Actor, command: Command, options: SubmitOptions) -> Result<Outcome, Refusal> {
        // Before anything else: a request that was made before is answered, whatever has become of what it was about.
        if let Some(operation) = self.answered(&actor, &options).await? {
            return Ok(Outcome::Operation(Box::new(operation)));
        }
        if let Command::CreateTemplate { content, .. } = &command
            && let Some(blob) = content.blobs().find(|blob| !self.0.blobs.has(*blob))
        {
            let message = format!("blob {} of {} bytes was not uploaded", blob.digest, blob.size_bytes);
            return Err(Refusal::new(Code::InvalidInput, message).hint("upload it, then create the template"));
        }
        let request = Box::new(Request {
            id: RequestId(Uuid::now_v7()),
            actor,
            command,
            key: options.key,
            expect: options.expect,
            dry_run: options.dry_run,
            fresh: (0..Request::FRESH).map(|_| Uuid::now_v7()).collect(),
        });
        let (reply, answer) = oneshot::channel();
        self.send(Input::Request { request, reply })?;
        answer.await.map_err(|_| stopping())?
    }

    /// What the same request led to, by the store. The engine knows the answers that it gave since its world was loaded; those
    /// before that, of an earlier process or before a failed commit, are here alone.
    async fn answered(&self, actor: &Actor, options: &SubmitOptions) -> Result<Option<Operation>, Refusal> {
        let Some(key) = options.key.as_ref().filter(|_| !options.dry_run) else {
            return Ok(None);
        };
        let unreadable = |error: crate::StorageError| read_only(&error.story());
        let storage = &self.0.storage;
        let answer = storage.answer(actor.project, key.key.clone()).await;
        // An older one the engine replaces.
        let kept = |answer: &Answer| answer.at.after(engine::ANSWER_KEPT) > self.now();
        let Some(answer) = answer.map_err(unreadable)?.filter(kept) else {
            return Ok(None);
        };
        let operation = storage.operation(answer.operation).await.map_err(unreadable)?;
        let replayed = engine::replayed(&answer, key, operation.as_ref());
        replayed.map(Some).map_err(|refusal| *refusal)
    }

    /// Reads the committed world, as far as the actor may see it.
    ///
    /// # Errors
    /// `NotFound`; `Overloaded` at once when too much waits.
    pub async fn read(&self, actor: Actor, query: Query) -> Result<View, Refusal> {
        match query {
            Query::Operations(page) => self.operations(actor, page).await.map(View::Operations),
            Query::Operation(id) => self
                .operation(actor, id)
                .await
                .map(|view| View::Operation(Box::new(view))),
            query => {
                let view = self.ask(move |world, now| world.query(&actor, &query, now)).await?;
                view.map(|view| self.metered(view)).map_err(|refusal| *refusal)
            }
        }
    }

    /// With what went through ports.
    fn metered(&self, mut view: View) -> View {
        let ports = match &mut view {
            View::Port(port) => std::slice::from_mut(&mut **port),
            View::Ports(listing) => &mut listing.items,
            _ => &mut [],
        };
        for view in ports {
            view.traffic = self.0.meters.of(view.port.id);
        }
        view
    }

    /// An operation; one that ended long ago is no longer in the world, but in the store.
    async fn operation(&self, actor: Actor, id: OperationId) -> Result<OperationView, Refusal> {
        let (asker, query) = (actor.clone(), Query::Operation(id));
        let seen = self.ask(move |world, now| world.query(&asker, &query, now)).await?;
        let refusal = match seen {
            Ok(View::Operation(view)) => return Ok(*view),
            Ok(_) => return Err(Refusal::new(Code::NotFound, format!("there is no operation {id}"))),
            Err(refusal) => *refusal,
        };
        let stored = self
            .0
            .storage
            .operation(id)
            .await
            .map_err(|error| read_only(&error.story()))?;
        let visible = |operation: &Operation| operation.project == actor.project;
        let operation = stored.filter(visible).ok_or(refusal)?;
        Ok(OperationView {
            operation,
            progress: None,
        })
    }

    /// A page of the store's operations, with the progress of those that run.
    async fn operations(&self, actor: Actor, page: Page) -> Result<Listing<OperationView>, Refusal> {
        let page = Page {
            limit: page.limit.clamp(1, Page::LIMIT_MAX),
            ..page
        };
        let stored = self.0.storage.operations(Some(actor.project), page).await;
        let Listing { items, next } = stored.map_err(|error| read_only(&error.story()))?;
        let items = self
            .ask(move |world, now| {
                let view = |operation: Operation| match world.query(&actor, &Query::Operation(operation.id), now) {
                    // Both are committed; the world's may be newer.
                    Ok(View::Operation(view)) => *view,
                    _ => OperationView {
                        operation,
                        progress: None,
                    },
                };
                items.into_iter().map(view).collect()
            })
            .await?;
        Ok(Listing { items, next })
    }

    /// Watches notices and progress, from after the notice `after` on, or from now on.
    pub fn watch(
        &self,
        actor: Actor,
        after: Option<Sequence>,
    ) -> impl Stream<Item = WatchItem> + Send + Unpin + use<> + 'static {
        watch(self.0.committed.clone(), self.0.clock.clone(), actor, after)
    }

    /// Takes a blob's bytes; they are there only when all of them are and have that digest.
    ///
    /// # Errors
    /// When the actor may not, the bytes are others than announced, or the disk is full.
    pub async fn put_blob<S, E>(&self, actor: &Actor, digest: Digest, size_bytes: u64, pieces: S) -> Result<(), Refusal>
    where
        S: Stream<Item = Result<Bytes, E>> + Unpin,
        E: std::fmt::Display,
    {
        let taken = match needs(actor, Role::ProjectAdmin) {
            Ok(()) => self.0.blobs.put(Blob { digest, size_bytes }, pieces).await,
            Err(refusal) => Err(refusal),
        };
        self.note(actor, "blob.upload", digest.to_string(), taken.as_ref().err())
            .await;
        taken
    }

    /// Whether the controller has this blob, so that it need not be uploaded.
    #[must_use]
    pub fn has_blob(&self, digest: Digest, size_bytes: u64) -> bool {
        self.0.blobs.has(Blob { digest, size_bytes })
    }

    /// Opens a VM's serial console: what is written is typed, what is read was printed.
    ///
    /// # Errors
    /// When the actor may not, the VM is not there or off, or its host does not answer.
    pub async fn console(&self, actor: Actor, vm: Reference) -> Result<DuplexStream, Refusal> {
        let opened = self.open_console(actor.clone(), vm.clone()).await;
        self.note(&actor, "vm.console", vm.to_string(), opened.as_ref().err())
            .await;
        opened
    }

    async fn open_console(&self, actor: Actor, vm: Reference) -> Result<DuplexStream, Refusal> {
        needs(&actor, Role::Operator)?;
        let View::Vm(view) = self.read(actor, Query::Vm(vm)).await? else {
            return Err(Refusal::new(Code::NotFound, "there is no such VM"));
        };
        let VmView { id, name, status, .. } = *view;
        let held = status.host.filter(|_| status.state.holds_capacity());
        let Some(host) = held else {
            let message = format!("VM {name} is {}: it has no console", status.state);
            return Err(Refusal::new(Code::WrongState, message).hint("start it"));
        };
        let asked = self.0.consoles.ask(host)?;
        let down = Down::OpenConsole {
            console: asked.id,
            vm: VmId(id.0),
            generation: status.generation,
            ticket: asked.ticket,
        };
        let unreachable = || {
            Refusal::new(
                Code::HostUnreachable,
                format!("the agent of the host of VM {name} is not connected"),
            )
            .hint("look at the host and its network; the VM may well run")
        };
        let (sent, was_sent) = oneshot::channel();
        self.send(Input::Send { host, down, sent })?;
        if !was_sent.await.unwrap_or(false) {
            return Err(unreachable());
        }
        match tokio::time::timeout(CONSOLE_TICKET_VALID, asked.opened).await {
            Ok(Ok(Ok(()))) => Ok(asked.persons_end),
            Ok(Ok(Err(refusal))) => Err(refusal),
            Ok(Err(_)) => Err(unreachable()),
            Err(_) => {
                let message = format!("the agent of the host of VM {name} did not open the console in time");
                Err(Refusal::new(Code::TimedOut, message).hint("try again"))
            }
        }
    }

    /// All figures that the actor may see, in the text format of OpenMetrics 1.0: the controller's own; those of VMs of its project, for
    /// cloud admins of all; those of hosts for cloud admins.
    #[must_use]
    pub fn metrics(&self, actor: &Actor) -> String {
        self.0.committed.count();
        let mut text = self.0.metrics.text();
        self.0.telemetry.scrape(actor, &self.0.committed, &mut text);
        self.0.meters.scrape(actor, &self.0.committed, &mut text);
        text.push_str("# EOF\n");
        text
    }

    /// Whether all is well.
    #[must_use]
    pub fn health(&self) -> Health {
        let last = self.0.health.borrow().clone();
        // A loop that panicked has not said so.
        let stopped = self.0.inputs.is_closed();
        Health { stopped, ..last }
    }

    /// `HOST:PORT` of the interface, as others reach it: what follows the `@` in `godwit agent --join TOKEN@HOST:PORT`.
    #[must_use]
    pub fn api_endpoint(&self) -> &str {
        &self.0.authority.api_endpoint
    }

    pub(crate) fn authority(&self) -> &Authority {
        &self.0.authority
    }

    /// Who the controller itself is where it asks on its own behalf.
    pub(crate) async fn own_actor(&self) -> Result<Actor, Refusal> {
        let default: model::Name = "default".parse().expect("`default` is a name");
        let project = self
            .ask(move |world, _| world.project_by_name(&default).map(|project| project.id))
            .await?;
        let project = project.ok_or_else(|| Refusal::new(Code::NotFound, "there is no project default"))?;
        Ok(Actor {
            subject: "controller".to_owned(),
            project,
            role: Role::CloudAdmin,
            via: Via::default(),
        })
    }

    /// The loop's time.
    pub(crate) fn now(&self) -> Timestamp {
        self.0.clock.now()
    }

    /// Reads the committed world.
    pub(crate) async fn ask<T, F>(&self, read: F) -> Result<T, Refusal>
    where
        T: Send + 'static,
        F: FnOnce(&World, Timestamp) -> T + Send + 'static,
    {
        let (reply, answer) = oneshot::channel();
        let ask = Box::new(move |world: &World, now: Timestamp| {
            // Who asked may have gone.
            let _ = reply.send(read(world, now));
        });
        self.send(Input::Ask(ask))?;
        answer.await.map_err(|_| match self.health().read_only {
            Some(story) => read_only(&story),
            None => stopping(),
        })
    }

    fn send(&self, input: Input) -> Result<(), Refusal> {
        self.0.inputs.try_send(input).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => {
                self.0.metrics.overloaded();
                Refusal::new(Code::Overloaded, "the controller has as much to do as it takes")
                    .hint("try again in a second")
            }
            mpsc::error::TrySendError::Closed(_) => stopping(),
        })
    }
}

fn stopping() -> Refusal {
    Refusal::new(Code::Overloaded, "the controller is stopping").hint("try again, with the same idempotency key")
}

pub(crate) fn needs(actor: &Actor, role: Role) -> Result<(), Refusal> {
    if actor.role >= role {
        return Ok(());
    }
    let message = format!(
        "{} may not do this: its role here is {}, {role} is needed",
        actor.subject, actor.role
    );
    Err(Refusal::new(Code::Forbidden, message).hint("use a token with that role, or ask for the role"))
}

/// The id under which a token is kept: made of its hash, so that it is found without being compared.
pub(crate) fn token_id(token: &ApiToken) -> TokenId {
    let mut id = [0; 16];
    let hash = Sha256::new()
        .chain_update(b"godwit token id")
        .chain_update(token.digest().0)
        .finalize();
    id.copy_from_slice(&hash[..16]);
    TokenId(uuid::Builder::from_custom_bytes(id).into_uuid())
}

/// A token's hash as it is stored.
pub(crate) fn token_hash(token: &ApiToken) -> TokenHash {
    TokenHash(token.digest().0)
}
