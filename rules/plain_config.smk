# Included before the configuration is read: it is data, and Snakemake would run expressions in it.
import os
import sys

sys.path.insert(0, os.path.join(workflow.basedir, "src"))

from mmpipe.plan.configfile import read_plainly

# profiles/default does the same before Snakemake reads --configfile; without that profile, this comes too late for those
read_plainly(workflow.config_settings.configfiles)
