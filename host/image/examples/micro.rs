//! Builds the micro template: `cargo run -p image --example micro -- DIRECTORY CACHE`.

use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    let [directory, cache] = arguments.as_slice() else {
        eprintln!("usage: micro DIRECTORY CACHE");
        return ExitCode::from(2);
    };
    let mut show = |p: image::micro::Progress| {
        println!(
            "{:?}: {} ({} of {} bytes)",
            p.step, p.detail, p.bytes_done, p.bytes_total
        );
    };
    match image::micro::build(directory.as_ref(), &image::micro::Sources::found(cache), &mut show) {
        Ok(files) => println!("{files:#?}"),
        Err(error) => {
            eprintln!("{error}");
            let mut source = std::error::Error::source(&error);
            while let Some(cause) = source {
                eprintln!("  because: {cause}");
                source = cause.source();
            }
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}
