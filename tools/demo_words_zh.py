"""The vocabulary of the synthetic shop in Chinese: each English word of `demo_words` with what a Chinese shop says.

Owns words and how a title is put together; draws nothing. Every brand and line is invented.
"""

from __future__ import annotations

_PAIRS = """
Clothing=服装|Shoes=鞋靴|Accessories=配饰|Women=女|Men=男|spring-summer=春夏|autumn-winter=秋冬|all-year=四季
T-Shirts=T恤|Shirts=衬衫|Blouses=女式衬衫|Tanks=背心|Activewear=运动服饰|Sweatshirts=卫衣|Knitwear=针织衫|Jeans=牛仔裤
Trousers=长裤|Shorts=短裤|Skirts=半身裙|Dresses=连衣裙|Coats=大衣|Jackets=夹克|Blazers=西装|Sneakers=运动鞋
Flats=平底鞋|Heels=高跟鞋|Sandals=凉鞋|Boots=靴子|Bags=包|Jewellery=首饰|Watches=手表|Hats=帽子|Scarves=围巾
Belts=皮带|Sunglasses=墨镜|Plain T-Shirts=纯色T恤|Graphic T-Shirts=印花T恤|Henleys=亨利衫|Casual Shirts=休闲衬衫
Dress Shirts=正装衬衫|Overshirts=衬衫外套|Printed Blouses=印花衬衫|Dress Blouses=正装女衬衫|Camisoles=吊带衫
Athletic Tanks=运动背心|Polos=POLO衫|Training Tops=训练上衣|Hoodies=连帽卫衣|Cardigans=针织开衫|Turtlenecks=高领毛衣
Jumpers=套头毛衣|Straight Jeans=直筒牛仔裤|Loose Jeans=宽松牛仔裤|Chinos=休闲裤|Dress Trousers=西裤
Cargo Trousers=工装裤|Work Trousers=木工裤|Wide Trousers=阔腿裤|Casual Trousers=便裤|Joggers=束脚裤|Leggings=打底裤
Midi Skirts=中长裙|Maxi Skirts=长裙|Mini Skirts=短裙|Midi Dresses=中长连衣裙|Shirt Dresses=衬衫裙
Maxi Dresses=长款连衣裙|Mini Dresses=短款连衣裙|Knit Dresses=针织裙|Sport Dresses=运动裙|Trench Coats=风衣
Wool Coats=毛呢大衣|Puffer Jackets=羽绒服|Bomber Jackets=飞行员夹克|Rain Jackets=冲锋衣|Work Jackets=工装外套
Casual Coats=休闲大衣|Single-Breasted Blazers=单排扣西装|Light Jackets=薄外套|Capes=斗篷|Casual Sneakers=休闲鞋
High-Tops=高帮鞋|Running Shoes=跑步鞋|Trail Shoes=越野跑鞋|Loafers=乐福鞋|Lace-Ups=系带鞋|Ballerinas=芭蕾鞋
Kitten Heels=猫跟鞋|Block Heels=粗跟鞋|Espadrilles=草编鞋|Flat Sandals=平底凉鞋|Clogs=木底鞋|Lace-Up Boots=系带靴
Chelsea Boots=切尔西靴|Ankle Boots=短靴|Platform Boots=厚底靴|Slides=拖鞋|Tote Bags=托特包|Crossbody Bags=斜挎包
Belt Bags=腰包|Sport Bags=健身包|Backpacks=双肩包|Satchels=剑桥包|Shoulder Bags=单肩包|Basket Bags=草编包
Clutches=手拿包|Necklaces=项链|Earrings=耳饰|Bracelets=手链|Rings=戒指|Analogue Watches=指针手表
Digital Watches=电子手表|Caps=棒球帽|Bucket Hats=渔夫帽|Beanies=毛线帽|Sun Hats=遮阳帽|Neckerchiefs=领巾
Casual Belts=休闲皮带|Casual Shorts=休闲短裤|Messenger Bags=邮差包|Aviators=飞行员墨镜|Crew-Neck Tee=圆领T恤
Graphic Tee=印花T恤|Henley=亨利衫|Button-Down Shirt=扣领衬衫|Oxford Shirt=牛津纺衬衫|Overshirt=衬衫外套
Camp-Collar Shirt=古巴领衬衫|Peasant Blouse=田园风衬衫|Tie-Neck Blouse=系带领衬衫|Puff-Sleeve Blouse=泡泡袖衬衫
Camisole=吊带衫|Tank=背心|Polo=POLO衫|Half-Zip Pullover=半拉链衫|Hoodie=连帽卫衣|Cardigan=针织开衫
Turtleneck Sweater=高领毛衣|Cable-Knit Jumper=麻花毛衣|Straight-Leg Jeans=直筒牛仔裤|Baggy Jeans=宽松牛仔裤
Pleated Trousers=百褶西裤|Cargo Pants=工装裤|Carpenter Pants=木工裤|Wide-Leg Pants=阔腿裤|Drawstring Pants=抽绳裤
Running Shorts=跑步短裤|Bermuda Shorts=百慕大短裤|Midi Skirt=中长裙|Tiered Maxi Skirt=蛋糕裙|Mini Skirt=短裙
Corduroys=灯芯绒裤|Wrap Midi Dress=裹身裙|Slip Dress=吊带裙|Shirt Dress=衬衫裙|Maxi Dress=长款连衣裙|Tea Dress=茶歇裙
T-Shirt Dress=T恤裙|Column Dress=直筒裙|Sweater Dress=毛衣裙|Pinafore Dress=背带裙|Tennis Dress=网球裙
Hooded Sweat Dress=卫衣裙|Trench Coat=风衣|Overcoat=毛呢大衣|Puffer Jacket=羽绒服|Bomber Jacket=飞行员夹克
Windbreaker=防晒衣|Shell Jacket=冲锋衣|Chore Jacket=工装外套|Barn Coat=谷仓外套|Blazer=西装|Kimono Jacket=和服外套
Cropped Bolero=波莱罗|Poncho=斗篷|Low-Top Sneakers=低帮运动鞋|High-Top Sneakers=高帮运动鞋|Trail Runners=越野跑鞋
Derby Shoes=德比鞋|Ballet Flats=芭蕾鞋|Slingbacks=后空凉鞋|Mary Janes=玛丽珍鞋|Strappy Sandals=绑带凉鞋
Work Boots=工装靴|Desert Boots=沙漠靴|Pool Slides=拖鞋|Tote=托特包|Crossbody Bag=斜挎包|Belt Bag=腰包
Gym Duffel=健身包|Backpack=双肩包|Satchel=剑桥包|Hobo Bag=流浪包|Basket Bag=草编包|Clutch=手拿包|Tool Tote=工具包
Messenger Bag=邮差包|Bar Pendant Necklace=一字项链|Pearl Drop Earrings=珍珠耳坠|Hoop Earrings=耳环
Beaded Bracelet=串珠手链|Signet Ring=印章戒指|Field Watch=腕表|Fitness Watch=运动手表|Baseball Cap=棒球帽
Bucket Hat=渔夫帽|Beanie=毛线帽|Wide-Brim Hat=宽檐帽|Neck Scarf=领巾|Leather Belt=皮带|Aviator Sunglasses=飞行员墨镜
Poplin=府绸|Lyocell=天丝|Linen-Blend=棉麻|Merino=美利奴羊毛|Double-Faced Wool=双面羊毛|Ponte=罗马布|Cotton Gauze=棉纱
Crochet=钩花|Suede=麂皮|Brushed Cotton=磨毛棉|Mohair=马海毛|Jersey=平纹棉|Mesh=网眼|Nylon=尼龙
Heavyweight Fleece=重磅抓绒|Bonded Jersey=复合针织|Seersucker=泡泡纱|Pique=珠地棉|Tweed=粗花呢|Flannel=法兰绒
Quick-Dry Knit=速干针织|Stretch Nylon=弹力尼龙|Thermal Knit=保暖针织|Polar Fleece=摇粒绒|Softshell=软壳|Chiffon=雪纺
Broderie Cotton=绣花棉|Satin=缎面|Velvet=丝绒|Brushed Crepe=磨毛绉|Chambray=青年布|Ripstop=防撕裂布|Hemp Cotton=麻棉
Duck Canvas=厚帆布|Moleskin=鼹鼠皮布|Smooth Leather=光面皮|Canvas=帆布|Nubuck=磨砂皮|Raffia=拉菲草
Woven Leather=编织皮|Shearling=羊羔毛|Knit Mesh=飞织|Patent=漆皮|Rubberised Leather=涂胶皮|Calfskin=小牛皮
Nappa=纳帕皮|Burnished Leather=擦色皮|Engineered Mesh=工程网布|Foam=泡棉|Waterproof Mesh=防水网布|Waxed Canvas=蜡帆布
Oiled Leather=油蜡皮|Roughout Leather=反绒皮|Matte Steel=哑光钢|Brushed Silver=拉丝银|Straw=草编|Turquoise-Set=绿松石
Hammered Brass=锤纹黄铜|Chunky Steel=粗钢|Coated Canvas=涂层帆布|Gold-Tone=金色|Saffiano Leather=十字纹皮
Silk Twill=真丝斜纹|Recycled Nylon=再生尼龙|Silicone=硅胶|Water-Repellent Nylon=防泼水尼龙|Rose Gold=玫瑰金
Freshwater Pearl=淡水珍珠|Brass=黄铜|Bridle Leather=马缰革|Clean-Line=利落|Boxy=廓形|Seamless=无缝|Fringed=流苏
Embroidered=刺绣|Flowing=飘逸|Oversized=超大版|Drop-Shoulder=落肩|Paneled=拼接|Tailored=合体剪裁
Double-Stitched=双线缝|Regular-Fit=常规版|Performance=高性能|Reflective=反光|Compression=紧身|Ruffled=荷叶边
Lace-Trim=蕾丝边|Bow-Front=蝴蝶结|Utility=多袋|Triple-Stitch=三线缝|Patch-Pocket=贴袋|Unlined=无衬里|Tonal=同色
Hand-Woven=手工编织|Tasselled=流苏饰|Chunky=厚实|Platform-Sole=松糕底|Welted=固特异|Almond-Toe=杏仁头|Cushioned=缓震
Lightweight=轻便|Ankle-Strap=踝带|Bow-Detail=蝴蝶结饰|Lug-Sole=齿底|Steel-Shank=钢芯|Slim=纤薄|Unbranded=无标
Hand-Beaded=手工串珠|Braided=编绳|Logo=标志|Chain-Link=链条|Structured=挺括|Monogram=字母纹|Sweatproof=防汗
Packable=可折叠|Delicate=精致|Scalloped=扇贝边|Riveted=铆钉|Heavy-Duty=耐用|Black=黑色|White=白色|Ivory=象牙白
Stone=石色|Charcoal=炭灰|Navy=藏青|Rust=铁锈红|Olive=橄榄绿|Ochre=赭黄|Terracotta=陶土色|Sand=沙色|Chestnut=栗色
Sage=鼠尾草绿|Blush=腮红粉|Lilac=丁香紫|Powder Blue=粉蓝|Butter=奶黄|Mint=薄荷绿|Cobalt=钴蓝|Fuchsia=玫红|Scarlet=猩红
Tangerine=橘色|Lime=青柠绿|Turquoise=松石绿|Burgundy=酒红|Forest Green=墨绿|Plum=梅紫|Ink=墨蓝|Teal=凫蓝
Aubergine=茄紫|Arlo=阿洛|Plane=平面|Nuoro=努奥罗|Sexton=塞顿|Halden=哈登|Zephira=泽菲|Marrow=玛洛|Tamsin=塔辛
Cadiz=加的斯|Willa=薇拉|Riot=喧闹|Block=街区|Kuro=库洛|Vandal=涂鸦客|Metro=地铁|Alderney=奥德尼|Regent=摄政
Camber=坎伯|Beaufort=博福|Wexley=韦克斯|Pulse=脉动|Vector=矢量|Tempo=节拍|Ridge=山脊|Kinetic=动能|Odette=奥黛
Clemence=克莱芒|Isolde=伊索|Fleur=花语|Mirelle=米蕾|Foreman=工头|Smithy=铁匠铺|Dockside=码头|Granger=农庄|Tack=马具
Norvale=诺瓦谷|Sondrel=松德蕾|Ilmari Field=伊玛原|Fernmoor=蕨原|Ondaro=翁达罗|Amberlyne=琥珀琳|Dravik=德拉维
Kestrin=凯斯特林|Northgate 88=北门88|Vellacott=维拉阁|Brackwell Row=布拉井|Patchley=帕奇里|Runmark=跑迹
Tarnfield=塔恩野|Volenta=沃伦塔|Maribeau=玛丽波|Lunelle Grove=月林|Posyline=花束莱|Osk & Pine=欧松|Carrowick=卡洛维
Hartisan=哈匠|Stridell=迈德尔|Tolvane=托尔文|Mirabon=米拉邦|Sandkell=沙克尔|Kadenza=卡登萨|Blokwerk=布洛工坊
Pellworth=佩尔沃|Orrin & Vale=奥林谷|Skarsted=斯卡德|Fleetholm=弗利霍|Pirouelle=皮露艾|Rosamere=罗莎湖
Bruntsoles=布伦底|Ironbeck=铁溪|Lindqvane=林德文|Ostenby=奥斯滕|Satchmere=萨奇湖|Wovenna=织娜|Bexholt=贝克斯林
Kryptone=克里通|Corvella=柯薇拉|Trovanne=特罗凡|Paceloop=步环|Ravelle=拉薇尔|Aurisel=奥丽塞|Welkin Loop=天环
Pockthorn=口袋棘|Harrow Supply=耙社|Machine wash at 30 degrees.=30度机洗。
Wipe clean with a damp cloth.=湿布擦拭即可。|Dry clean only.=只可干洗。
Made to last and easy to mend.=经久耐穿，易于修补。|Ships in recycled paper.=再生纸包装。
a gallery afternoon=逛画廊的午后|a warm day at the studio=工作室的暖日|a weekday in town=城里的工作日
a winter opening=冬日开幕式|a beach weekend=海边周末|a festival day=音乐节|a cabin weekend=木屋周末
a night by the fire=炉边之夜|a skate park afternoon=滑板公园的午后|a rooftop party=天台派对|a city night out=城市夜游
a record fair=唱片集市|a garden lunch=花园午餐|a summer office week=夏日办公周|a client meeting=见客户
a Sunday roast=周日家宴|a morning run=晨跑|a tennis match=网球赛|a training camp=训练营|a frosty trail=霜冻小径
a summer wedding=夏日婚礼|a picnic for two=双人野餐|a candlelit dinner=烛光晚餐|an evening at the ballet=芭蕾之夜
a day in the workshop=工坊一日|a farmers' market=农夫集市|a week on site=工地一周|a walk in the woods=林间散步
look=造型|outfit=穿搭|set=套装
"""
WORDS: dict[str, str] = {
    pair.rpartition("=")[0]: pair.rpartition("=")[2] for line in _PAIRS.strip().splitlines() for pair in line.split("|")
}
"""English word or phrase -> Chinese."""


def write_title(
    form: int, brand: str, whose: str, line: str, cloth: str, cut: str, noun: str, colour: str, size: str
) -> str:
    """Put a title together as Chinese shops do; two of the four forms carry words that only sell."""
    brand, line, cloth, cut, noun, colour = (
        WORDS[one] if one else "" for one in (brand, line, cloth, cut, noun, colour)
    )
    person = {"Women": "女", "Men": "男", "": ""}[whose]
    number = f" {size}码" if size else ""
    match form:
        case 0:
            return f"{brand} {line}{cloth}{cut}{noun}{person} {colour}{number}"
        case 1:
            return f"{brand}新款{line}{cut}{noun} {colour}{cloth} {person and person + '款'}{number}".replace("  ", " ")
        case 2:
            return f"{person and person + '士'}{cut}{cloth}{noun} {brand}{line} {colour}{number}"
        case _:
            return f"{brand}{line}{noun} {cloth}{cut}{person} {colour} 包邮{number}"


def write_bundle(lead: str, what: str, occasion: str) -> str:
    """Name an outfit."""
    return f"{WORDS[occasion]}{WORDS[lead]}{WORDS[what]}"
