//! The plots: one panel per load, one bar per system and figure, as SVG.

use crate::load::DISK_LOADS;
use crate::row::Row;
use anyhow::{Result, anyhow};
use plotters::coord::Shift;
use plotters::prelude::{BLACK, DrawingArea, IntoDrawingArea, IntoFont, RGBColor, Rectangle, SVGBackend, Text, WHITE};
use plotters::style::Color;
use std::path::Path;

const SIZE: (u32, u32) = (1200, 760);
/// Where bars begin, after the names.
const LEFT: i32 = 150;
/// Room for the figure behind a bar.
const RIGHT: i32 = 90;
const TOP: i32 = 34;
const COLORS: [RGBColor; 3] = [RGBColor(31, 119, 180), RGBColor(255, 127, 14), RGBColor(214, 39, 40)];

/// A figure of a row with its name.
type Figure = (&'static str, fn(&Row) -> Option<f64>);

/// What a plot shows.
#[derive(Debug, Clone, Copy)]
struct Plot {
    file: &'static str,
    title: &'static str,
    figures: &'static [Figure],
    /// For figures that differ by orders of magnitude.
    logarithmic: bool,
}

fn known(value: f64) -> Option<f64> {
    (value > 0.0).then_some(value)
}

const PLOTS: [Plot; 3] = [
    Plot { file: "iops.svg", title: "IOPS (more is better)", figures: &[("IOPS", |r| known(r.iops))], logarithmic: false },
    Plot {
        file: "latency.svg",
        title: "Latency, us: p50, p99, p99.9 (logarithmic, less is better)",
        figures: &[("p50", |r| known(r.p50_us)), ("p99", |r| known(r.p99_us)), ("p99.9", |r| known(r.p999_us))],
        logarithmic: true,
    },
    Plot {
        file: "cpu.svg",
        title: "CPU of all processes, us per IO (less is better)",
        figures: &[("CPU", |r| r.cpu_us_per_io.and_then(known))],
        logarithmic: false,
    },
];

/// Writes all plots into `folder`.
///
/// # Errors
/// A file cannot be written.
pub(crate) fn write(folder: &Path, rows: &[Row]) -> Result<()> {
    std::fs::create_dir_all(folder)?;
    for plot in PLOTS {
        draw(&folder.join(plot.file), &plot, rows).map_err(|e| anyhow!("draw {}: {e}", plot.file))?;
    }
    Ok(())
}

type DrawResult = Result<(), Box<dyn std::error::Error>>;

fn draw(path: &Path, plot: &Plot, rows: &[Row]) -> DrawResult {
    let root = SVGBackend::new(path, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let root = root.titled(plot.title, ("sans-serif", 22))?;
    for (panel, load) in root.split_evenly((2, 3)).iter().zip(DISK_LOADS) {
        let of: Vec<&Row> = rows.iter().filter(|row| row.load == load.name).collect();
        draw_panel(panel, plot, load.name, &of)?;
    }
    root.present()?;
    Ok(())
}

fn draw_panel(area: &DrawingArea<SVGBackend<'_>, Shift>, plot: &Plot, title: &str, rows: &[&Row]) -> DrawResult {
    area.draw(&Text::new(title.to_owned(), (10, 10), ("sans-serif", 16).into_font().color(&BLACK)))?;
    let (width, height) = area.dim_in_pixel();
    let bars = i32::try_from(rows.len() * plot.figures.len())?.max(1);
    let pitch = ((i32::try_from(height)? - TOP - 10) / bars).clamp(5, 34);
    let room = f64::from(i32::try_from(width)? - LEFT - RIGHT);
    let values: Vec<f64> = rows.iter().flat_map(|row| plot.figures.iter().filter_map(|(_, f)| f(row))).collect();
    let font = pitch.clamp(8, 14);
    for (i, row) in rows.iter().enumerate() {
        for (k, (_, figure)) in plot.figures.iter().enumerate() {
            let y = TOP + i32::try_from(i * plot.figures.len() + k)? * pitch;
            if k == 0 {
                let name = Text::new(row.system.clone(), (10, y), ("sans-serif", 13).into_font().color(&BLACK));
                area.draw(&name)?;
            }
            let Some(value) = figure(row) else { continue };
            let end = LEFT + pixels(room * share(value, &values, plot.logarithmic));
            let bar = [(LEFT, y), (end, y + (pitch * 4 / 5).max(3))];
            area.draw(&Rectangle::new(bar, COLORS[k % COLORS.len()].filled()))?;
            let text = crate::markdown::thousands(value);
            area.draw(&Text::new(text, (end + 4, y), ("sans-serif", font).into_font().color(&BLACK)))?;
        }
    }
    Ok(())
}

/// Length of a bar, 0 to 1: of the largest value, or between a tenth of the smallest and the largest on a logarithmic scale.
fn share(value: f64, all: &[f64], logarithmic: bool) -> f64 {
    let max = all.iter().copied().fold(f64::MIN_POSITIVE, f64::max);
    if !logarithmic {
        return value / max;
    }
    let floor = all.iter().copied().fold(f64::INFINITY, f64::min) / 10.0;
    (value / floor).ln() / (max / floor).ln()
}

#[allow(clippy::cast_possible_truncation)] // rounded to a pixel of a plot
fn pixels(value: f64) -> i32 {
    value.round() as i32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::RANDWRITE_D32;

    #[test]
    fn bars_are_in_proportion() {
        assert!((share(5.0, &[5.0, 10.0], false) - 0.5).abs() < 1e-9);
        assert!((share(10.0, &[10.0, 1000.0], true) - 1.0 / 3.0).abs() < 1e-9);
        assert!((share(1000.0, &[10.0, 1000.0], true) - 1.0).abs() < 1e-9);
    }

    #[test]
    fn every_plot_names_systems_and_figures() {
        let folder = std::env::temp_dir().join(format!("ogee-plots-{}", std::process::id()));
        let load = RANDWRITE_D32.name.to_owned();
        let row = Row { system: "some-system".to_owned(), load, iops: 1234.0, p50_us: 1.0, p99_us: 2.0, p999_us: 4321.0,
            cpu_us_per_io: Some(77.0), ..Row::default() };
        write(&folder, &[row]).expect("written");
        for (file, figure) in [("iops.svg", "1,234"), ("latency.svg", "4,321"), ("cpu.svg", "77")] {
            let text = std::fs::read_to_string(folder.join(file)).expect("written");
            assert!(text.contains("some-system") && text.contains(figure) && text.contains("4k-randwrite-d32"), "{file}");
        }
        std::fs::remove_dir_all(&folder).expect("removed");
    }
}
