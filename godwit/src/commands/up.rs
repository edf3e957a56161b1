//! `godwit up`: a controller and an agent on this machine, in one process. The first start joins the two by itself.

use std::path::{Path, PathBuf};

use ::controller::{Handle, StateDir};
use clap::Args;
use identity::{Address, ApiToken, JoinTarget};
use model::{
    Actor, HostId, Millis, Name,
    name::Reference,
    query::{Query, View},
};

use super::{
    agent::{self, HostFlags, Places},
    controller::{self, ConfigFlag, FiguresFlags, ListenFlags, NetworkFlags},
};
use crate::{
    cli::Common,
    commands::STATE,
    exit::{Exit, Failure},
    out, shutdown,
};

/// How long the token is valid with which this machine's own agent joins.
const TOKEN_VALID: Millis = Millis::seconds(60);

/// Run a controller and an agent on this machine.
#[derive(Args, Debug)]
pub(crate) struct Up {
    #[command(flatten)]
    pub(crate) file: ConfigFlag,
    #[command(flatten)]
    listen: ListenFlags,
    #[command(flatten)]
    network: NetworkFlags,
    #[command(flatten)]
    figures: FiguresFlags,
    #[command(flatten)]
    host: HostFlags,
    /// Name of this host; without it, the machine's host name
    #[arg(long, value_name = "NAME")]
    host_name: Option<Name>,
}

impl Up {
    pub(crate) async fn run(self, common: &Common) -> Result<(), Failure> {
        let state = std::path::absolute(common.state.as_deref().unwrap_or(Path::new(STATE)));
        let state = state.map_err(|error| Failure::of(Exit::Usage, &error))?;
        agent::open_directory(&state)?;
        let run = if common.state.is_some() {
            state.join("run")
        } else {
            PathBuf::from("/run/godwit")
        };
        let places = Places {
            state: state.join("agent"),
            run,
            pool: state.join("pool"),
        };
        let asked = shutdown::asked_for()?;
        let flags = controller::Controller {
            file: self.file,
            listen: self.listen,
            network: self.network,
            figures: self.figures,
        };
        let home = state.join("controller");
        // First: whoever waits for `ready` must not get it from what then ends because of a slip.
        let (gateway, prefix) = flags.network.gateway_with_prefix();
        let config = self
            .host
            .config(places, controller::outward_address(), Some((gateway.into(), prefix)))?;
        let (controller, handle) = controller::start(&flags, home.clone()).await?;
        let own_api = controller.api_address();
        let name = self.host_name.unwrap_or_else(agent::own_name);
        let work = async {
            // This machine's own controller: who starts both here wants this host in its cell.
            if !config.has_joined() || agent::was_removed(&config).await? {
                let address = Address {
                    host: reached_at(own_api).to_string(),
                    port: own_api.port(),
                };
                let target = token(&handle, &home, address).await?;
                agent::join(&config, Some(&target), &name).await?;
            }
            let started = agent::start(config).await?;
            agent::ready(&started, &known_as(&handle, &home, started.host()).await?)?;
            out::note(&format!(
                "to use it, in another terminal: godwit{} vm list",
                state_flag(common)
            ));
            started.run().await;
            Ok(())
        };
        beside(controller, work, asked).await
    }
}

/// Serves and works until it is told to stop, or either ends. VMs and migrations go on.
async fn beside(
    controller: ::controller::Controller,
    work: impl Future<Output = Result<(), Failure>>,
    asked: impl Future<Output = ()>,
) -> Result<(), Failure> {
    tokio::select! {
        ended = work => ended,
        // An agent beside a controller that is dead is of no use: whoever supervises this process starts both anew.
        ended = controller::serve_until(controller, asked) => ended,
    }
}

/// Where this machine reaches a port of its own.
fn reached_at(listening: std::net::SocketAddr) -> std::net::IpAddr {
    match listening.ip() {
        ip if ip.is_unspecified() => std::net::Ipv4Addr::LOCALHOST.into(),
        ip => ip,
    }
}

fn state_flag(common: &Common) -> String {
    common
        .state
        .as_ref()
        .map(|state| format!(" --state {}", state.display()))
        .unwrap_or_default()
}

/// The first administrator, in whose name this machine is set up.
fn administrator(handle: &Handle, home: &Path) -> Result<Actor, Failure> {
    let first =
        ApiToken::read_file(&StateDir::new(home).admin_token()).map_err(|error| Failure::of(Exit::Failed, &error))?;
    Ok(handle.authenticate(&first.reveal())?)
}

/// The name that the cell gave this host; it may have been renamed since.
async fn known_as(handle: &Handle, home: &Path, host: HostId) -> Result<Name, Failure> {
    let query = Query::Host(Reference::Id(host.0));
    match handle.read(administrator(handle, home)?, query).await? {
        View::Host(view) => Ok(view.host.name),
        _ => Err(Failure::new(
            Exit::Failed,
            format!("the controller does not know this host, {host}"),
        )),
    }
}

/// A token for this machine's own agent.
async fn token(handle: &Handle, home: &Path, address: Address) -> Result<JoinTarget, Failure> {
    let actor = administrator(handle, home)?;
    let text = handle.add_join_token(actor, TOKEN_VALID).await?;
    let token = text
        .parse()
        .map_err(|error: identity::JoinTokenError| Failure::of(Exit::Failed, &error))?;
    Ok(JoinTarget { token, address })
}

#[cfg(test)]
mod tests {
    use std::{future::pending, sync::Arc};

    use ::controller::{Config, Controller, DefaultNetwork, Memory, Storage, StorageError, Stored, Waited};
    use model::{
        AuditEntry, Change, Operation, OperationId, ProjectId,
        audit::AuditFilter,
        change::Answer,
        query::{Listing, Page},
    };

    use super::*;

    /// A store of a cell that another controller leads since its first start.
    struct Deposed(Memory);

    impl Storage for Deposed {
        fn load(&self) -> Waited<'_, Stored> {
            self.0.load()
        }

        fn recover(&self) -> Waited<'_, Stored> {
            self.0.recover()
        }

        fn commit(&self, changes: Vec<Change>) -> Waited<'_, ()> {
            Box::pin(async move {
                if !self.0.load().await?.rows.is_empty() {
                    return Err(StorageError::Deposed);
                }
                self.0.commit(changes).await
            })
        }

        fn answer(&self, project: ProjectId, key: String) -> Waited<'_, Option<Answer>> {
            self.0.answer(project, key)
        }

        fn operation(&self, id: OperationId) -> Waited<'_, Option<Operation>> {
            self.0.operation(id)
        }

        fn operations(&self, project: Option<ProjectId>, page: Page) -> Waited<'_, Listing<Operation>> {
            self.0.operations(project, page)
        }

        fn audit(&self, filter: AuditFilter, page: Page) -> Waited<'_, Listing<AuditEntry>> {
            self.0.audit(filter, page)
        }
    }

    #[tokio::test]
    async fn up_does_not_outlive_its_controller() {
        let directory = tempfile::tempdir().unwrap();
        let config = Config {
            state: directory.path().to_owned(),
            api_listen: "127.0.0.1:0".parse().unwrap(),
            agents_listen: "127.0.0.1:0".parse().unwrap(),
            names: vec!["127.0.0.1".to_owned()],
            network: DefaultNetwork {
                address: "10.91.0.0".parse().unwrap(),
                prefix: 24,
                gateway: None,
                first: "10.91.0.10".parse().unwrap(),
                last: "10.91.0.99".parse().unwrap(),
            },
            telemetry_bytes_max: Config::TELEMETRY_BYTES,
        };
        let storage = Arc::new(Deposed(Memory::default()));
        let (controller, handle) = Controller::start_with(config, storage).await.unwrap();
        let actor = administrator(&handle, directory.path()).unwrap();
        let up = tokio::spawn(beside(controller, pending(), pending()));
        let write = handle.add_join_token(actor, TOKEN_VALID).await;
        assert!(write.is_err());
        let ended = tokio::time::timeout(std::time::Duration::from_secs(30), up).await;
        let failure = ended.unwrap().unwrap().unwrap_err();
        assert!(format!("{failure:?}").contains("ended by itself"), "{failure:?}");
    }
}
