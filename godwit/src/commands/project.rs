//! `godwit project`: tenants, and what their VMs may hold.

use clap::{Args, Subcommand};
use clap_complete::ArgValueCompleter;
use model::{Name, access::Quota, name::Reference};
use serde_json::json;

use super::{Heading, Session, completion, host::said};
use crate::{
    exit::Failure,
    out::{self, table, units},
};

/// What can be done with projects.
#[derive(Subcommand, Debug)]
pub(crate) enum Project {
    /// Make a project
    Create {
        /// Its name
        name: Name,
        #[command(flatten)]
        bounds: Bounds,
    },
    /// List projects in which you have a role
    List,
    /// Show a project: what it may hold, and holds
    Show {
        /// Name or id
        #[arg(add = ArgValueCompleter::new(completion::projects))]
        name: Reference,
    },
    /// Delete a project in which nothing is
    Delete {
        /// Name or id
        #[arg(add = ArgValueCompleter::new(completion::projects))]
        name: Reference,
    },
    /// Bound what a project's VMs may hold; bounds that are left out stay
    Quota {
        /// Name or id
        #[arg(add = ArgValueCompleter::new(completion::projects))]
        name: Reference,
        #[command(flatten)]
        bounds: Bounds,
    },
}

/// Bounds, each a number or `none`.
#[derive(Args, Debug)]
pub(crate) struct Bounds {
    /// Most VMs
    #[arg(long, value_parser = count, value_name = "COUNT|none")]
    vms: Option<Bound>,
    /// Most vCPUs, all VMs together
    #[arg(long, value_parser = count, value_name = "COUNT|none")]
    vcpus: Option<Bound>,
    /// Most memory, all VMs together
    #[arg(long, value_parser = memory, value_name = "SIZE|none")]
    memory: Option<Bound>,
    /// Most disk, all VMs together, as guests see it
    #[arg(long, value_parser = disk, value_name = "SIZE|none")]
    disk: Option<Bound>,
}

/// A bound as it is given: `None` takes it away.
#[derive(Clone, Copy, Debug)]
struct Bound(Option<u64>);

fn bound(text: &str, read: impl Fn(&str) -> Result<u64, String>) -> Result<Bound, String> {
    match text {
        "none" => Ok(Bound(None)),
        text => read(text).map(|number| Bound(Some(number))),
    }
}

fn count(text: &str) -> Result<Bound, String> {
    bound(text, |text| {
        text.parse().map_err(|_| "give a number, or none".to_owned())
    })
}

fn memory(text: &str) -> Result<Bound, String> {
    bound(text, units::mebibytes)
}

fn disk(text: &str) -> Result<Bound, String> {
    bound(text, units::bytes)
}

impl Bounds {
    fn over(&self, present: Quota) -> Quota {
        let take = |given: Option<Bound>, present| given.map_or(present, |Bound(bound)| bound);
        Quota {
            vms: take(self.vms, present.vms),
            vcpus: take(self.vcpus, present.vcpus),
            memory_mib: take(self.memory, present.memory_mib),
            disk_bytes: take(self.disk, present.disk_bytes),
        }
    }
}

impl Project {
    pub(crate) async fn run(self, session: &Session) -> Result<(), Failure> {
        let client = &session.client;
        match self {
            Self::Create { name, bounds } => {
                let body = json!({ "name": name, "quota": bounds.over(Quota::default()) });
                let made = client.post("/v1/projects", &body).await?;
                if session.format.is_data() {
                    return out::data(session.format, &made);
                }
                said(session, true, &format!("project {name} is made"))
            }
            Self::List => session.list("/v1/projects", None, HEADING, row).await,
            Self::Show { name } => session.show(&format!("/v1/projects/{name}"), facts).await,
            Self::Delete { name } => {
                let what = format!("project {name}");
                let done = session.delete(&format!("/v1/projects/{name}"), &what).await?.is_some();
                said(session, done, &format!("{what} is deleted"))
            }
            Self::Quota { name, bounds } => {
                let path = format!("/v1/projects/{name}");
                let project: model::Project = out::read(&client.get(&path).await?)?;
                let value = client
                    .put(&format!("{path}/quota"), &bounds.over(project.quota))
                    .await?;
                if session.format.is_data() {
                    return out::data(session.format, &value);
                }
                out::text(&facts(out::read(&value)?))
            }
        }
    }
}

const HEADING: Heading = Heading {
    narrow: &["NAME", "VMS", "VCPUS", "MEMORY", "DISK"],
    wide: &["ID"],
};

fn share(used: u64, bound: Option<u64>, show: impl Fn(u64) -> String) -> String {
    match bound {
        Some(bound) => format!("{}/{}", show(used), show(bound)),
        None => show(used),
    }
}

fn shares(project: &model::Project) -> [String; 4] {
    let (used, quota) = (&project.used, &project.quota);
    let plain = |number: u64| number.to_string();
    [
        share(used.vms, quota.vms, plain),
        share(used.vcpus, quota.vcpus, plain),
        share(used.memory_mib, quota.memory_mib, units::show_mebibytes),
        share(used.disk_bytes, quota.disk_bytes, units::show_bytes),
    ]
}

fn row(project: model::Project, wide: bool) -> Vec<String> {
    let mut row = vec![project.name.to_string()];
    row.extend(shares(&project));
    if wide {
        row.push(project.id.to_string());
    }
    row
}

fn facts(project: model::Project) -> String {
    let [vms, vcpus, memory, disk] = shares(&project);
    table::facts(&[
        ("name", project.name.to_string()),
        ("id", project.id.to_string()),
        ("vms", vms),
        ("vcpus", vcpus),
        ("memory", memory),
        ("disk", disk),
    ])
}
