//! `godwit template`: what VMs are made from.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use clap::{Args, Subcommand, ValueEnum};
use clap_complete::ArgValueCompleter;
use model::{
    Name, PoolId, Template as View,
    name::Reference,
    storage::Format,
    template::{Boot, Content, Disk, Seed, TemplateState},
};
use serde_json::json;

use super::{Heading, Session, completion, host::said};
use crate::{
    exit::{Exit, Failure},
    follow::{Wait, follow},
    out::{table, units},
};

mod build;
mod upload;

use build::Build;
use upload::upload;

/// What can be done with templates.
#[derive(Subcommand, Debug)]
pub(crate) enum Template {
    /// Build a template here, upload it and wait until it is ready
    Build(Box<Build>),
    /// Make a template of a disk image, or of a kernel and an initial RAM disk
    Import(Box<Import>),
    /// List templates
    List,
    /// Show a template
    Show {
        /// Name or id
        #[arg(add = ArgValueCompleter::new(completion::templates))]
        template: Reference,
    },
    /// Delete a template that no VM is made from; one that is not there is deleted already
    Delete {
        /// Name or id
        #[arg(add = ArgValueCompleter::new(completion::templates))]
        template: Reference,
        #[command(flatten)]
        wait: Wait,
    },
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum DiskFormat {
    Qcow2,
    Raw,
}

#[derive(Clone, Copy, Debug, Default, ValueEnum)]
enum Seeded {
    /// Not at all
    #[default]
    None,
    /// From a small disk that cloud-init reads
    NoCloud,
}

/// A template to make of files.
#[derive(Args, Debug)]
pub(crate) struct Import {
    /// Its name
    name: Name,
    /// Its disk; without --kernel, what its guests boot from
    #[arg(required_unless_present = "kernel", value_name = "DISK")]
    disk: Option<PathBuf>,
    /// The disk's format; without it, by the file's name: .qcow2, .raw or .img
    #[arg(long, value_enum, requires = "disk")]
    format: Option<DiskFormat>,
    /// A kernel that the hypervisor loads itself
    #[arg(long, requires = "initrd", value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// Its initial RAM disk
    #[arg(long, requires = "kernel", value_name = "FILE")]
    initrd: Option<PathBuf>,
    /// Its command line
    #[arg(
        long,
        requires = "kernel",
        default_value = "",
        hide_default_value = true,
        value_name = "WORDS"
    )]
    cmdline: String,
    /// Least memory that its guests need, such as 256M
    #[arg(long, default_value = "64M", value_parser = units::mebibytes, value_name = "SIZE")]
    memory_min: u64,
    /// How its guests learn their host name, addresses and SSH keys; `no-cloud` is for images with cloud-init
    #[arg(long, value_enum, default_value_t)]
    seed: Seeded,
    #[command(flatten)]
    wait: Wait,
}

impl Template {
    pub(crate) async fn run(self, session: &Session) -> Result<(), Failure> {
        match self {
            Self::Build(build) => build.run(session).await,
            Self::Import(import) => import.run(session).await,
            Self::List => session.list("/v1/templates", None, HEADING, row).await,
            Self::Show { template } => {
                let people = !session.format.is_data();
                let pools = if people {
                    session.names("/v1/pools").await?
                } else {
                    BTreeMap::new()
                };
                session
                    .show(&format!("/v1/templates/{template}"), |view| facts(view, &pools))
                    .await
            }
            Self::Delete { template, wait } => {
                let what = format!("template {template}");
                let Some(answer) = session.delete(&format!("/v1/templates/{template}"), &what).await? else {
                    return Ok(());
                };
                let followed = follow(&session.client, session.format, answer, wait).await?;
                said(session, followed.is_done(), &format!("{what} is deleted"))
            }
        }
    }
}

async fn create(session: &Session, name: &Name, content: &Content, wait: Wait) -> Result<(), Failure> {
    let answer = session
        .client
        .post("/v1/templates", &json!({ "name": name, "content": content }))
        .await?;
    let followed = follow(&session.client, session.format, answer, wait.unless_told()).await;
    let followed = followed.map_err(|failure| match failure.advice() {
        "" if failure.exit() == Exit::Failed => failure.hint(go_on(name)),
        _ => failure,
    })?;
    said(session, followed.is_done(), &format!("template {name} is ready"))
}

/// How to go on after a template that failed: it keeps its name, and says why it did.
fn go_on(name: &Name) -> String {
    format!("remove it, which frees its name: godwit template delete {name}")
}

impl Import {
    async fn run(self, session: &Session) -> Result<(), Failure> {
        for file in [&self.kernel, &self.initrd].into_iter().flatten() {
            if let Err(error) = std::fs::File::open(file) {
                let message = format!("cannot read {}: {error}", file.display());
                return Err(Failure::new(Exit::Failed, message).hint("nothing was uploaded"));
            }
        }
        let disk = match &self.disk {
            Some(path) => Some(self.disk(session, path).await?),
            None => None,
        };
        let boot = match (&self.kernel, &self.initrd) {
            (Some(kernel), Some(initrd)) => Boot::Direct {
                kernel: upload(&session.client, kernel).await?,
                initrd: upload(&session.client, initrd).await?,
                cmdline: self.cmdline.clone(),
            },
            _ => Boot::Bios,
        };
        let content = Content {
            boot,
            disk,
            memory_mib_min: self.memory_min,
            seed: match self.seed {
                Seeded::None => Seed::None,
                Seeded::NoCloud => Seed::NoCloud,
            },
        };
        create(session, &self.name, &content, self.wait).await
    }

    /// Judges the disk here first: what a host would refuse need not be uploaded.
    async fn disk(&self, session: &Session, path: &Path) -> Result<Disk, Failure> {
        let format = match self.format {
            Some(DiskFormat::Qcow2) => Format::Qcow2,
            Some(DiskFormat::Raw) => Format::Raw,
            None => by_name(path)?,
        };
        let refused = |error: image::Refusal| {
            Failure::new(
                Exit::Failed,
                format!("{} is refused: {}", path.display(), crate::exit::chain(&error)),
            )
        };
        let info = image::vet(path, format).map_err(refused)?;
        Ok(Disk {
            blob: upload(&session.client, path).await?,
            format,
            size_bytes: info.virtual_bytes,
        })
    }
}

/// The format that a file's name tells. Its bytes are not asked: a guest may have written them.
fn by_name(path: &Path) -> Result<Format, Failure> {
    let extension = path
        .extension()
        .and_then(|extension| extension.to_str())
        .unwrap_or_default();
    match extension.to_ascii_lowercase().as_str() {
        "qcow2" => Ok(Format::Qcow2),
        "raw" | "img" => Ok(Format::Raw),
        _ => {
            let message = format!("the name of {} does not tell its format", path.display());
            Err(Failure::new(Exit::Usage, message).hint("give --format qcow2 or --format raw"))
        }
    }
}

fn state(view: &View) -> &'static str {
    match view.state {
        TemplateState::Importing => "importing",
        TemplateState::Ready { .. } => "ready",
        TemplateState::Failed { .. } => "failed",
        TemplateState::Deleting => "deleting",
    }
}

fn boot(view: &View) -> &'static str {
    match view.content.boot {
        Boot::Direct { .. } => "kernel",
        Boot::Bios => "bios",
    }
}

const HEADING: Heading = Heading {
    narrow: &["NAME", "STATE", "BOOT", "DISK", "CREATED"],
    wide: &["ID"],
};

fn row(view: View, wide: bool) -> Vec<String> {
    let disk = view
        .content
        .disk
        .map(|disk| units::show_bytes(disk.size_bytes))
        .unwrap_or_default();
    let mut row = vec![
        view.name.to_string(),
        state(&view).to_owned(),
        boot(&view).to_owned(),
        disk,
        units::show_time(view.created_at),
    ];
    if wide {
        row.push(view.id.to_string());
    }
    row
}

fn facts(view: View, names: &BTreeMap<String, String>) -> String {
    let mut lines = vec![
        ("name", view.name.to_string()),
        ("id", view.id.to_string()),
        ("state", state(&view).to_owned()),
        ("boot", boot(&view).to_owned()),
        ("least memory", units::show_mebibytes(view.content.memory_mib_min)),
        ("created", units::show_time(view.created_at)),
    ];
    match &view.state {
        TemplateState::Failed { reason, .. } => {
            let next = Some(&reason.hint).filter(|hint| !hint.is_empty());
            let next = next.cloned().unwrap_or_else(|| go_on(&view.name));
            lines.extend([("reason", reason.message.clone()), ("next", next)]);
        }
        TemplateState::Ready { pools, fetching } => {
            let called = |id: String| names.get(&id).cloned().unwrap_or(id);
            let named = |pools: &[PoolId]| {
                let pools: Vec<String> = pools.iter().map(|pool| called(pool.to_string())).collect();
                pools.join(", ")
            };
            lines.push(("pools", named(pools)));
            if !fetching.is_empty() {
                lines.push(("fetched into", named(fetching)));
            }
        }
        TemplateState::Importing | TemplateState::Deleting => {}
    }
    if let Boot::Direct {
        kernel,
        initrd,
        cmdline,
    } = &view.content.boot
    {
        lines.push((
            "kernel",
            format!("{}, {}", units::show_bytes(kernel.size_bytes), kernel.digest),
        ));
        lines.push((
            "initrd",
            format!("{}, {}", units::show_bytes(initrd.size_bytes), initrd.digest),
        ));
        lines.push(("command line", cmdline.clone()));
    }
    if let Some(disk) = &view.content.disk {
        let size = units::show_bytes(disk.size_bytes);
        lines.push((
            "disk",
            format!("{size}, {}, {}", disk.format.as_str(), disk.blob.digest),
        ));
    }
    table::facts(&lines)
}
